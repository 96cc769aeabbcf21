"""Checkpoints: Hugging Face folders, and random weights."""

from executor.checkpoint.folder import Checkpoint, WeightSource

__all__ = ["Checkpoint", "WeightSource"]
