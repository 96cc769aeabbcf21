"""Tokenizers, and the text that continues a prompt."""
