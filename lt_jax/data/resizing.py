"""Brings images in memory to one size and number of channels, once on loading."""


def brought_to(arrays, size, channels):
  """Placeholder until the merge."""
  raise NotImplementedError
