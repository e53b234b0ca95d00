"""Kernels of the scoring and training path, one folder each, with an XLA reference; they import jax alone."""
