"""Which ranks fit a budget, who asks for them, who applies them, and what is written down."""
