"""The page of `lt_jax.probe --retrieval`: queries and their nearest images."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lt_jax.report import templates
from lt_jax.report.pictures import uri
from lt_jax.report.runs import printable


class Query(NamedTuple):
  """A query and its nearest images.

  Attributes:
    image: (H, W, channels) uint8.
    name: its class.
    found: images of the gallery, nearest first.
    names: their classes.
  """

  image: np.ndarray
  name: str
  found: Sequence[np.ndarray]
  names: Sequence[str]


def page(layer: str, measured: Mapping[str, float], queries: Sequence[Query]) -> str:
  """Returns the page as HTML.

  Args:
    layer: the layer whose features are compared.
    measured: name -> value in [0, 1], over all queries.
    queries: the ones to show.
  """
  environment = templates.environment()
  rows = [
    {
      'query': {'uri': uri(query.image), 'name': printable(query.name)},
      'found': [
        {'uri': uri(image), 'name': printable(name), 'right': name == query.name}
        for image, name in zip(query.found, query.names, strict=True)
      ],
    }
    for query in queries
  ]
  percentages = {
    k.replace('_', ' '): f'{100 * value:.1f} %' for k, value in measured.items()
  }
  return environment.get_template('retrieval.html').render(
    layer=layer, measured=percentages, rows=rows
  )
