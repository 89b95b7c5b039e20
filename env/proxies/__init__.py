"""Small pretrained transformers that ship with the package."""
