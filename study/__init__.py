"""What can be learned from runs: their page, why their decisions were taken, where the bytes go."""
