"""Sandwiched Policy Gradient (SPG) for masked diffusion language models."""

__version__ = "0.6.0"
