"""Memory and time of a step on a card, forecast from a model's name before anything is loaded."""
