"""State, step, loop, data and checkpoints of the trainer."""
