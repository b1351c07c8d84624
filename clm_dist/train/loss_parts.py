"""How many tokens' loss is computed at once; no torch, so that a plan can say it as well."""

_LOGITS_ON_CPU, _LOGITS_ON_GPU = 2**19, 2**24
"""Few enough for the cache of a CPU, and enough for the start of a GPU's kernel not to count."""


def tokens_at_once(vocab_size: int, *, on_cpu: bool) -> int:
    """Tokens whose loss is computed at once: a power of two, so that their logits stay aligned as those of all are."""
    most = max(1, (_LOGITS_ON_CPU if on_cpu else _LOGITS_ON_GPU) // vocab_size)
    return 1 << (most.bit_length() - 1)
