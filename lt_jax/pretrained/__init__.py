"""Initial weights: published ones, and those of lt_jax's own runs."""
