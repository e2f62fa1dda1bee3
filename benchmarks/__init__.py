"""Timings, each one command that shows two things side by side."""
