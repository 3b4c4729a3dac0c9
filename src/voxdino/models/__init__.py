"""Backbones, adapters, input builders, decoders: from crops to voxel logits."""
