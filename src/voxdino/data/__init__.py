"""From prepared cases to batches: the store, seeded draws, augmentation on the device, cached frozen features."""
