"""Backbones: images in, patch features out."""
