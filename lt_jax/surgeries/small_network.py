"""A small network on features: one hidden layer, trained with mini-batches.

It has no unique optimum. Random numbers depend only on the shapes, so the same examples
give the same network.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

HIDDEN = 128
BATCH = 100
EPOCHS = 30
LEAST_STEPS = 300
RATE = 1e-3


class SmallNetwork(NamedTuple):
  """A network with one hidden layer.

  Attributes:
    kernels: (D, H) and (H, C).
    biases: (H,) and (C,).
  """

  kernels: tuple[np.ndarray, np.ndarray]
  biases: tuple[np.ndarray, np.ndarray]

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """Returns the scores (N, C) of features (N, D)."""
    (first, second), (shift, bias) = self
    return np.maximum(x @ first + shift, 0) @ second + bias


def objective(
  net: SmallNetwork,
  x: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  decay: jax.Array | float,
) -> jax.Array:
  r"""Returns the objective for a batch.

  .. math::
    \frac{\sum_n a_n \mathrm{CE}(z_n, y_n)}{\sum_n a_n} + \frac{\lambda}{2}
    (|W_1|^2 + |W_2|^2), \qquad z = \max(x W_1 + b_1, 0) W_2 + b_2

  Args:
    net: the network.
    x: features (N, D).
    labels: (N,) int.
    weights: a (N,); if all are 0, the first term is 0.
    decay: lambda.
  """
  (first, second), (shift, bias) = net
  scores = jnp.maximum(x @ first + shift[None], 0) @ second + bias[None]
  losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
  total = weights.sum()
  mean = jnp.vdot(weights, losses) / jnp.where(total > 0, total, 1)
  return mean + decay / 2 * sum(jnp.vdot(kernel, kernel) for kernel in net.kernels)


def small_network(
  x: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  decays: Sequence[float] = (0.01,),
  *,
  weights: np.ndarray | None = None,
) -> list[SmallNetwork]:
  """Trains a network with one hidden layer of 128 units, using Adam and a cosine rate.

  Args:
    x: features (N, D), which should have mean 0 and deviation 1.
    labels: (N,) int.
    num_classes: C.
    decays: the values of lambda in `objective`.
    weights: (N,), for instance 0 to leave examples out; 1 by default.

  Returns:
    one network per decay, in the same order.
  """
  rng = np.random.default_rng(0)
  batch = min(BATCH, len(x))
  steps = max(LEAST_STEPS, EPOCHS * len(x) // batch)
  epochs = -(-steps * batch // len(x))
  order = np.concatenate([rng.permutation(len(x)) for _ in range(epochs)])
  order = jnp.asarray(order[: steps * batch].reshape(steps, batch))
  dtype = np.asarray(x).dtype
  weights = np.ones(len(x)) if weights is None else weights
  data = jnp.asarray(x), jnp.asarray(labels), jnp.asarray(weights, dtype)
  sizes = x.shape[1], HIDDEN, num_classes
  kernels = tuple(
    jnp.asarray(rng.normal(0, np.sqrt(2 / a), (a, b)), dtype)
    for a, b in zip(sizes, sizes[1:], strict=False)
  )
  first = SmallNetwork(kernels, tuple(jnp.zeros(n, dtype) for n in sizes[1:]))
  return [jax.device_get(_trained(first, data, order, decay)) for decay in decays]


@jax.jit
def _trained(
  net: SmallNetwork,
  data: tuple[jax.Array, jax.Array, jax.Array],
  order: jax.Array,
  decay: jax.Array | float,
) -> SmallNetwork:
  """Returns the network after a step for each row of an order (steps, batch)."""
  rate = optax.cosine_decay_schedule(RATE, len(order))
  optimizer = optax.adam(rate)

  def step(carry, rows):
    net, state = carry
    grads = jax.grad(objective)(net, *(part[rows] for part in data), decay)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(net, updates), state), None

  return lax.scan(step, (net, optimizer.init(net)), order)[0][0]
