"""Plans of ranks within a budget, and how to build them from scores."""
