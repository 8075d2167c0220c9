"""The HTML templates of pages."""

import jinja2


def environment() -> jinja2.Environment:
  """Returns what opens the templates in this folder; a missing value is an error."""
  return jinja2.Environment(
    loader=jinja2.PackageLoader('lt_jax.report', '.'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
