"""A run on disk: its directory, its status, and the jobs of a multirun."""
