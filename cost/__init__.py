"""Memory: budgets, and the bytes of a training step, predicted for any plan or measured."""
