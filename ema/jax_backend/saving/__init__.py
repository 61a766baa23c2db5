"""Saving, loading and restoring averages."""
