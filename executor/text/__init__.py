"""Tokenizers, and the text that continues a prompt."""

from executor.text.loading import load_tokenizer

__all__ = ["load_tokenizer"]
