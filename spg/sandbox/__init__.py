"""Run a program that a model wrote against unit tests, safely."""
