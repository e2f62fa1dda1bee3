"""Reading answers out of completions."""
