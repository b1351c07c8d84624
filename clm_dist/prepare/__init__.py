"""Text to blocks, once, on CPUs."""
