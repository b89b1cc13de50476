"""Freezing layers that have converged."""
