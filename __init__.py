"""rankpilot."""
