"""Runs a policy: weights, KV cache and hidden states on the tiers that it names.

The module ``generate`` is the command; ``Runner`` is what it drives.
"""

import os

# First, because it tells of libraries that cannot be imported.
import profiles  # noqa: F401

# Before torch first allocates on a GPU: otherwise, close to its budget, it gives memory back and
# takes it anew for every temporary of another size, which stops the GPU each time.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from executor.checkpoint import Checkpoint
from executor.results import BlockResult, Progress
from executor.runner import Runner
from executor.sampling import Sampler

__all__ = ["BlockResult", "Checkpoint", "Progress", "Runner", "Sampler"]
