"""Linen building blocks that several models share."""
