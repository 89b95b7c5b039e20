"""What the shipped policy gains on proxy tasks that it never saw, and the page that tells it."""
