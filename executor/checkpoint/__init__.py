"""Hugging Face folders, opened and read."""

from executor.checkpoint.folder import Checkpoint, WeightSource

__all__ = ["Checkpoint", "WeightSource"]
