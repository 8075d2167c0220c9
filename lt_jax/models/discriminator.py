"""Domain classifiers: from a layer of a network to which domain an image is of."""

from collections.abc import Sequence

import jax
from flax import linen as nn

from lt_jax.models.heads import dense


class DomainClassifier(nn.Module):
  """Linear layers with ReLU between them, down to one logit.

  Attributes:
    hidden: sizes of the layers before the logit; none for a linear classifier.

  Source: Ganin et al., arXiv 1505.07818, figure 4: (100,) for MNIST, (1024, 1024) for
  SVHN and GTSRB.
  """

  hidden: Sequence[int]

  @nn.compact
  def __call__(self, layer: jax.Array) -> jax.Array:
    """Maps a layer (B, D) to logits (B,) of being a target image."""
    x = layer
    for number, size in enumerate(self.hidden, 1):
      x = nn.relu(dense(size, inputs=x.shape[-1], name=f'fc{number}')(x))
    return dense(1, inputs=x.shape[-1], name='logit')(x)[:, 0]


def mlp(*, hidden: Sequence[int] = (100,)) -> DomainClassifier:
  """Returns a domain classifier with hidden layers of these sizes."""
  return DomainClassifier(tuple(hidden))
