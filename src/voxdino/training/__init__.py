"""The training loop and what it stands on: losses, optimiser, schedule, checkpoints, curves. Knows no data set."""
