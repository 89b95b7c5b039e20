"""One training step within its limit: the run it belongs to, the rows it takes, the plan that keeps it there."""
