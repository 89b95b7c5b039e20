"""The trained policy: its network, its plan values and its files."""
