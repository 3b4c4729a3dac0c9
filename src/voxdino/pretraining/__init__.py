"""Self-supervised pretraining on unlabelled images: the pool of slices, views, losses, stages, and what came of it."""
