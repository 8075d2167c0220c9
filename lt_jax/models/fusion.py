r"""Fusion: adds contributions of a memory and of the domain to a target feature.

.. math::
  x = v + \sum \text{gates} \odot \text{what they let in}, \qquad
  z = \text{a squashed cosine classifier of } x

v is the direct feature, m what it reads from a memory of class centroids, and d a
domain feature. The entries of `FORMS` differ in what they let in, and through which
gate.

Source: Liu et al., "Open Compound Domain Adaptation", CVPR 2020, arXiv 1909.03403, and
the authors' code, which has all five forms.
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
  """The direct feature gates the memory: tanh(v W) m."""
  del d
  return gate(v, 'concept_selector') * m


def domain(gate: Gate, v: jax.Array, m: jax.Array, d: jax.Array) -> jax.Array:
  """The direct feature gates the domain, without memory: tanh(v W) d."""
  del m
  return gate(v, 'domain_selector') * d


def released(gate: Gate, v: jax.Array, m: jax.Array, d: jax.Array) -> jax.Array:
  """As in the released config: tanh(v W) m + 0.01 tanh(v W') d."""
  return selector(gate, v, m, d) + 0.01 * domain(gate, v, m, d)


def paper(gate: Gate, v: jax.Array, m: jax.Array, d: jax.Array) -> jax.Array:
  """The domain gates the memory: tanh(d W) m."""
  del v
  return gate(d, 'domain_selector') * m


def both(gate: Gate, v: jax.Array, m: jax.Array, d: jax.Array) -> jax.Array:
  """The domain and the direct feature gate it: tanh(d W') tanh(v W) m."""
  return gate(d, 'domain_selector') * selector(gate, v, m, d)


class Form(NamedTuple):
  """A form of fusion.

  Attributes:
    added: (gate, v, m, d) -> what is added to v, where gate is (inputs, name) ->
      tanh(inputs W + b).
    reads_domain: whether it needs d.
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
"""In the order of their numbers 0 to 4 in the authors' code."""


class Fusion(nn.Module):
  """Enriches and classifies a direct feature.

  Attributes:
    form: a key of `FORMS`.
    scale: factor of the logits.
    num_classes: a method sets it.
  """

  form: str
  scale: float
  num_classes: int = 0

  @property
  def reads_domain(self) -> bool:
    """Whether it needs 'domain'."""
    return FORMS[self.form].reads_domain

  @nn.compact
  def __call__(self, read: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Maps 'direct', 'memory' and optionally 'domain', each (B, D), to outputs.

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
  """Returns the `Fusion` of a form; the method sets the number of classes.

  Raises:
    UserError: an unknown form.
  """
  lookup(FORMS, 'form of fusion', form)
  return Fusion(form, scale)
