"""The ``ema`` command."""
