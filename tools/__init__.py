"""Makers of what the package ships: proxy bases, data sets of plan runs. From a checkout."""
