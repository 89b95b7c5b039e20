"""Offline: figures and reports of runs."""
