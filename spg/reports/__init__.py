"""Figures, tables and pages made of results."""
