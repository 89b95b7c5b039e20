"""Deciding: rules and predictions, what they see, the log, what applies plans, what corrects the rate."""
