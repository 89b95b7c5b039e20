"""Predicted bytes beside measured ones."""
