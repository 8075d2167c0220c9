"""Data: where images come from, which are trained on, and in which order."""
