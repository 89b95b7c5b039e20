"""How policies are compared."""
