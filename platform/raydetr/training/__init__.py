"""Training: the loop, its optimiser, checkpoints, and the driver that starts it on Ray Train."""
