"""Hollow models: on the meta device, without contents, and run as another device would run them."""
