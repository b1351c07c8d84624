"""Blocks to a model: driver, workers, loop, evaluation, checkpoints."""
