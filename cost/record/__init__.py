"""What a training step holds and computes, recorded in one run of it on any device, the meta device included."""
