"""Fine-tunes from probe to held-out loss, one at a time or stacked."""
