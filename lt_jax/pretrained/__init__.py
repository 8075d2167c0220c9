"""Initial weights: published ones, and those of our own runs."""
