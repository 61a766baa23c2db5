"""One update of all averages."""
