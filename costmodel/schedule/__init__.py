"""The zig-zag order as tasks, and the simulation of it."""
