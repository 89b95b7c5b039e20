"""Which plans of ranks fit a budget, and how scores become one of them."""
