"""The zig-zag schedule as tasks, and its simulation."""
