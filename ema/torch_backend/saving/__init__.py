"""The state of an average, and its file."""
