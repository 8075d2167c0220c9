"""Long-tailed, open-ended and cross-domain image recognition in JAX/Flax."""
