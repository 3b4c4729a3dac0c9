"""Scores of label maps against references, at the original resolution, with their definitions and their uncertainty."""
