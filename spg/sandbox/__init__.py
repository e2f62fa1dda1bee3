"""Runs a program that a model wrote against tests, safely."""
