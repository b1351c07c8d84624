"""What stages hand to each other: files that are whole or not there, stores, runs, checkpoints."""
