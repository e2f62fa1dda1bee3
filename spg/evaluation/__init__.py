"""Evaluation: completions of held-out examples, their measures, and how sure these are."""
