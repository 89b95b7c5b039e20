"""Adapters of many runs on one frozen model, trained side by side."""
