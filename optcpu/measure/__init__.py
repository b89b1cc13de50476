"""Measuring: what each variant is, the workers they run in, and how the figures are told."""
