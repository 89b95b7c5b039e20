"""The methods that are compared: a file each; `registry.py` lists them."""
