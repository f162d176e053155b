"""Measure tome_fx beside its peers: `python -m bench --help`."""
