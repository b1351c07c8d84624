"""What transformers loads, for all who load it: tokenizers and weights, whole or refused."""
