r"""Fusion: adds what a memory and the domain contribute to a target feature.

.. math::
  x = v + \sum \text{gates} \odot \text{what they let in}, \qquad
  z = \text{a squashed cosine classifier of } x

v is the direct feature, m what it reads from a memory of class centroids, and d a
feature of its domain. The forms of `FORMS` differ in what is let in, and by which gate.

Source: Liu et al., "Open Compound Domain Adaptation", CVPR 2020, arXiv 1909.03403, and
the authors' code, which has all five.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lt_jax.errors import lookup
from lt_jax.models.heads import CosineSquash, dense, norm

Gate = Callable[[jax.Array, str], jax.Array]


def selector(gate: Gate, v: jax.Array, m: jax.Array, d: jax.Array) -> jax.Array:
  """The direct feature chooses what it takes from the memory: tanh(v W) m."""
  del d
  return gate(v, 'concept_selector') * m


def domain(gate: Gate, v: jax.Array, m: jax.Array, d: jax.Array) -> jax.Array:
  """No memory: tanh(v W) d."""
  del m
  return gate(v, 'domain_selector') * d


def released(gate: Gate, v: jax.Array, m: jax.Array, d: jax.Array) -> jax.Array:
  """What the released configuration trains: tanh(v W) m + 0.01 tanh(v W') d."""
  return selector(gate, v, m, d) + 0.01 * domain(gate, v, m, d)


def paper(gate: Gate, v: jax.Array, m: jax.Array, d: jax.Array) -> jax.Array:
  """The domain says how much of the memory is taken: tanh(d W) m."""
  del v
  return gate(d, 'domain_selector') * m


def both(gate: Gate, v: jax.Array, m: jax.Array, d: jax.Array) -> jax.Array:
  """The domain and the direct feature do: tanh(d W') tanh(v W) m."""
  return gate(d, 'domain_selector') * selector(gate, v, m, d)


class Form(NamedTuple):
  """A form of fusion.

  Attributes:
    added: (gate, v, m, d) -> what is added to v; the gate of a name is (inputs, name)
      -> tanh(inputs W + b).
    reads_domain: whether there must be a d.
  """

  added: Callable[[Gate, jax.Array, jax.Array, jax.Array], jax.Array]
  reads_domain: bool = True


FORMS = {
  'selector': Form(selector, reads_domain=False),
  'domain': Form(domain),
  'released': Form(released),
  'paper': Form(paper),
  'both': Form(both),
}
"""In the order of the numbers 0 to 4 that they have in the authors' code."""


class Fusion(nn.Module):
  """A direct feature, enriched and classified.

  Attributes:
    form: a key of `FORMS`.
    scale: of the logits.
    num_classes: a method sets it.
  """

  form: str
  scale: float
  num_classes: int = 0

  @property
  def reads_domain(self) -> bool:
    """Whether it must be given 'domain'."""
    return FORMS[self.form].reads_domain

  @nn.compact
  def __call__(self, read: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Maps 'direct', 'memory' and perhaps 'domain', each (B, D), to outputs.

    Returns:
      'features' x (B, D), 'logits' (B, C) and 'borrowed' |x - v| / |v| (B,).
    """
    v = read['direct']

    def gate(x: jax.Array, name: str) -> jax.Array:
      return jnp.tanh(dense(v.shape[-1], inputs=x.shape[-1], name=name)(x))

    added = FORMS[self.form].added(gate, v, read['memory'], read.get('domain'))
    classify = CosineSquash(self.num_classes, self.scale, name='classifier')
    return {
      'features': v + added,
      'logits': classify(v + added),
      'borrowed': (norm(added, -1) / norm(v, -1))[:, 0],
    }


def fusion(*, form: str = 'paper', scale: float = 16.0) -> Fusion:
  """Returns a fusion by the name of its form; the method knows the classes.

  Raises:
    UserError: an unknown form.
  """
  lookup(FORMS, 'form of fusion', form)
  return Fusion(form, scale)
