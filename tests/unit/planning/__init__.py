"""Tests of spg.planning."""
