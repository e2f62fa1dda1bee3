"""From prompts to scored completions: decoding, collection, the order of prompts, recorded pairs."""
