"""The methods, by name. A method is one file here and one line in this dict."""

from lt_jax.methods.supervised import supervised

METHODS = {
  'supervised': supervised,
}
