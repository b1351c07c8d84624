"""Checkpoints on a rank: fragments of parameters, saved in the background and loaded."""
