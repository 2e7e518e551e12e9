"""Training: the loop, the optimizer, checkpoints, and the driver that starts them on Ray Train."""
