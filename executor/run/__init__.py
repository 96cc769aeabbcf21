"""A run: its blocks, and the handlers of their tasks."""
