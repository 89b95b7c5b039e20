"""The decision problem: proxy tasks, episodes on them, and the Gymnasium environments."""
