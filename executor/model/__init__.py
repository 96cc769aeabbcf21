"""The decoder's arithmetic, and the choice of the next token."""
