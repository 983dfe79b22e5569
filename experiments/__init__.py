"""Linear scripts, one a system: `python -m experiments.NAME --help`."""
