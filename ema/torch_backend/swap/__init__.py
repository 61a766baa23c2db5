"""Averages in place of the live weights, and copies of the model that show them."""
