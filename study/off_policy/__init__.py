"""Off-policy evaluation: what a policy would have gained, from runs that other policies decided."""
