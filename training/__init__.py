"""How a policy is trained, and how policies are compared."""
