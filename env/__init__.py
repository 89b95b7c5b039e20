"""The decision problem: proxy tasks, episodes, observation, reward, the Gymnasium environments."""
