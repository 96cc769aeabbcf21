"""Runs a policy: weights, KV cache and hidden states on the tiers that it names.

The module ``generate`` is the command; ``Runner`` is what it drives.
"""

from executor.checkpoint import Checkpoint
from executor.results import BlockResult, Progress
from executor.runner import Runner
from executor.sampling import Sampler

__all__ = ["BlockResult", "Checkpoint", "Progress", "Runner", "Sampler"]
