"""What a proxy episode fine-tunes: tasks, their data and their best known allocations."""
