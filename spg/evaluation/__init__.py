"""Scoring completions of held-out examples."""
