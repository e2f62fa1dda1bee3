"""Tasks: each owns its data, prompt, template, rewards and measures, in one file."""
