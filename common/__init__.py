"""What every part of the package shares."""
