"""Sealed chat between nodes."""
