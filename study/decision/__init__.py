"""One decision of a log: taken again, explained, and questioned."""
