"""What learns, and what was learned: the network of a policy and its files."""
