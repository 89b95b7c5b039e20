"""Who decides, and the log of it: rules, trained policies, what they see, and the link from decisions to tensors."""
