"""Makes the fixtures of tests/support known to all tests here."""

from tests.support.clusters import k8s_commands, kubernetes, whole_kubernetes
from tests.support.fakes import commands, slurm
from tests.support.ray_head import head

__all__ = ["commands", "head", "k8s_commands", "kubernetes", "slurm", "whole_kubernetes"]
