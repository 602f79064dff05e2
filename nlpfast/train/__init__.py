"""Training: one loop, its checkpoints, and the tasks that run through it."""
