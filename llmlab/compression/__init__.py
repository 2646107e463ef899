"""Fewer bits, fewer weights, smaller models."""
