"""Makes the fixtures of fakes.py and clusters.py known to all tests here."""

from tests.submit.clusters import k8s_commands, kubernetes, whole_kubernetes
from tests.submit.fakes import commands, slurm

__all__ = ["commands", "k8s_commands", "kubernetes", "slurm", "whole_kubernetes"]
