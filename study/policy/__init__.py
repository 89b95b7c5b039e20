"""Reports of trained policies."""
