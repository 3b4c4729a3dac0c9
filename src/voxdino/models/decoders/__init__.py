"""Decoders: from the features of a backbone to logits per voxel."""
