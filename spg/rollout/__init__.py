"""From prompts to scored completions."""
