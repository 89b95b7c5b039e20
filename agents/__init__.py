"""Trained agents: the network of a policy and its files."""
