"""Runs a policy: weights, KV cache and hidden states on the tiers that it names.

Modules here are commands; folders hold what they do. ``LLM`` is the Python interface, and
``run.runner.Runner`` is what all of them drive.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# First, because it tells of libraries that cannot be imported.
import profiles  # noqa: F401

# Before torch first allocates on a GPU: otherwise, close to its budget, it gives memory back and
# takes it anew for every temporary of another size, which stops the GPU each time.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

if TYPE_CHECKING:
    from executor.checkpoint.folder import Checkpoint
    from executor.llm import LLM
    from executor.model.sampling import Sampler
    from executor.model.sampling_params import SamplingParams
    from executor.run.logprobs import Logprob
    from executor.run.requests import CompletionOutput, RequestOutput
    from executor.run.results import BlockResult, Progress
    from executor.run.runner import Runner

__all__ = [
    "LLM",
    "BlockResult",
    "Checkpoint",
    "CompletionOutput",
    "Logprob",
    "Progress",
    "RequestOutput",
    "Runner",
    "Sampler",
    "SamplingParams",
]
_MODULES = {
    "LLM": "executor.llm",
    "BlockResult": "executor.run.results",
    "Checkpoint": "executor.checkpoint.folder",
    "CompletionOutput": "executor.run.requests",
    "Logprob": "executor.run.logprobs",
    "Progress": "executor.run.results",
    "RequestOutput": "executor.run.requests",
    "Runner": "executor.run.runner",
    "Sampler": "executor.model.sampling",
    "SamplingParams": "executor.model.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that this package is cheap to import."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
