"""Grids, volumes, files and errors: what every other layer stands on. Imports no torch."""
