"""How much memory, time and disk space averages will take."""
