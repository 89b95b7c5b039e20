"""Makers of what the package ships: proxy bases, suites of tasks, data sets of plan runs. From a checkout."""
