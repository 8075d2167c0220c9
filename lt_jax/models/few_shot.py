"""Few-shot recognition: generating the weights of a cosine classifier.

Source: Gidaris and Komodakis, Dynamic Few-Shot Visual Learning without Forgetting,
CVPR 2018, arXiv 1804.09458, and the authors' code.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lt_jax.models.convolution import INITIALISERS
from lt_jax.models.heads import product, unit
from lt_jax.models.normalisation import at_least_float32


class WeightGenerator(nn.Module):
  r"""Proposes a class's weight vector from each of its exemplars.

  An exemplar z attends to those classes with weights whose keys are like it:

  .. math::
    a_b = \mathrm{softmax}_b(\gamma\, \overline{W_q z + b_q} \cdot \overline{k_b}),
    \qquad
    g(z) = \phi_{avg} \odot z + \phi_{att} \odot \sum_b a_b \overline{w_b}

  where z has unit length and a bar means division by the length. The weight of a class
  is the mean of g over its exemplars.

  Initially W_q is the identity plus noise of 1e-3, and both phi are ones.

  Attributes:
    gamma: initial value; it is learned.

  Source: Gidaris and Komodakis, arXiv 1804.09458, section 3.1; the bias b_q and the
  initial values are from the code.
  """

  gamma: float = 10.0

  @nn.compact
  def __call__(
    self, features: jax.Array, kernel: jax.Array, attended: jax.Array
  ) -> jax.Array:
    """Maps exemplars to proposals.

    Args:
      features: (B, D), of any length.
      kernel: (D, C), the weights w_b of the classes.
      attended: (C,) bool, the classes b to attend to; at least one.

    Returns:
      (B, D).
    """
    width, num_classes = kernel.shape
    z = unit(at_least_float32(features))
    query = nn.Dense(
      width, kernel_init=near_identity, precision=lax.Precision.HIGHEST, name='query'
    )(z)
    # For a shape (C, D) this draws from N(0, 2 / D).
    keys_init = INITIALISERS['kaiming_fan_out']
    keys = self.param('keys', keys_init, (num_classes, width), jnp.float32)
    gamma = self.param('gamma', nn.initializers.constant(self.gamma), (), jnp.float32)
    likeness = gamma * product(unit(query), unit(keys).T)
    attention = jax.nn.softmax(jnp.where(attended[None], likeness, -jnp.inf))
    read = product(attention, unit(kernel, axis=0).T)
    ones = nn.initializers.ones
    phi_average = self.param('phi_average', ones, (width,), jnp.float32)
    phi_attention = self.param('phi_attention', ones, (width,), jnp.float32)
    return phi_average[None] * z + phi_attention[None] * read


def near_identity(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
  """Draws the identity plus noise of standard deviation 1e-3."""
  return jnp.eye(*shape, dtype=dtype) + 1e-3 * jax.random.normal(key, shape, dtype)
