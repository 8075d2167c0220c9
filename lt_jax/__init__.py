"""Long-tailed, open-ended and cross-domain image recognition in JAX/Flax."""

__version__ = '0.1.0'
