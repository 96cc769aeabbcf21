"""A model as shapes: its layers, and the bytes of each tensor."""
