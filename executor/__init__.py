"""Runs a policy: weights, KV cache and hidden states on the tiers that it names.

Modules here are commands; folders hold what they do. ``run.runner.Runner`` is what they drive.
"""

import os

# First, because it tells of libraries that cannot be imported.
import profiles  # noqa: F401

# Before torch first allocates on a GPU: otherwise, close to its budget, it gives memory back and
# takes it anew for every temporary of another size, which stops the GPU each time.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from executor.checkpoint.folder import Checkpoint
from executor.model.sampling import Sampler
from executor.run.results import BlockResult, Progress
from executor.run.runner import Runner

__all__ = ["BlockResult", "Checkpoint", "Progress", "Runner", "Sampler"]
