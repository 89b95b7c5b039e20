"""Reports and pictures of one fine-tune."""
