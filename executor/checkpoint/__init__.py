"""Hugging Face folders, opened and read."""
