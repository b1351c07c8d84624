"""Fine-tune a causal language model on a cluster, and trust what it says."""

__version__ = "0.1.0"
