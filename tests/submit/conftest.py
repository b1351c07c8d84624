"""Makes the fixtures of tests/support/fakes.py and clusters.py known to all tests here."""

from tests.support.clusters import k8s_commands, kubernetes, whole_kubernetes
from tests.support.fakes import commands, slurm

__all__ = ["commands", "k8s_commands", "kubernetes", "slurm", "whole_kubernetes"]
