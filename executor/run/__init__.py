"""A run: block by block, task by task."""
