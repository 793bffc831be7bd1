"""Measurements; results are committed beside the commands that make them."""
