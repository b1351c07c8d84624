"""The files that stages hand to each other: stores, runs, checkpoints, each whole or not there."""
