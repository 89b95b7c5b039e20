"""Reports on runs: their page, the reasons for their decisions, and their memory by layer and kind."""
