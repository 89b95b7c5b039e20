"""What can be learned from runs: their page, why they were decided so, where the bytes go."""
