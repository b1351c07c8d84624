"""Text to blocks, once, on CPUs; called, it is `interface.prepare`."""

from clm_dist import make_callable

make_callable(__name__)
