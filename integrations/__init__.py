"""rankpilot in programs of others: `rankpilot run` attaches to their Trainers."""
