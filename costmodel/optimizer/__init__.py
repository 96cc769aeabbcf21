"""The linear program, and the search for the best policy."""
