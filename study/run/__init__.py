"""What the folder of one fine-tune tells."""
