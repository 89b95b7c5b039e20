"""Decisions: rules, loss predictions, observations, the log, applying plans, and learning-rate control."""
