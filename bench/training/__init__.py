"""How fast training a policy is."""
