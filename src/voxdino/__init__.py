"""voxdino: DINOv3 vision transformers for 2-D and 3-D medical images."""

__version__ = "0.1.0"
