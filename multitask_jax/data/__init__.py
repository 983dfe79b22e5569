"""Data sets, one module each, read as arrays."""
