"""Makes the fixtures of fakes.py known to all tests here."""

from tests.submit.fakes import commands, slurm

__all__ = ["commands", "slurm"]
