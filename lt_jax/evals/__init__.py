"""Evaluation: on the device one small record an example, on the host plain NumPy.

`record` reduces a batch to a few numbers an image; `lt_jax.evals.collect` runs a pass
over a split and returns them whole. The metrics of `closed_set`, `calibration` and
`open_set` are then exact functions of (N,) arrays, whatever the batch or the devices.
"""

import jax
import jax.numpy as jnp

from lt_jax.method import Batch, Outputs


def record(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns what every classification metric needs to know of a batch.

  Args:
    outputs: with 'logits' (B, C) and perhaps 'known_score' (B,).
    batch: with 'label' (B,), -1 for an image of no known class; perhaps 'domain' (B,)
      and 'bad' (B,), whether another image stands in for one that cannot be read.

  Returns:
    (B,) arrays: 'label', 'prediction' (the arg max), 'confidence' (its softmax
    probability), 'known_score' (the method's, or else the confidence), 'energy' (the
    log-sum-exp of the logits, another score of the kind) and 'loss' (the cross-entropy
    in nats; 0 for label -1).

  Source of the energy, negated: Liu et al., Energy-based Out-of-distribution Detection,
  arXiv 2010.03759, equation 4 with T = 1.
  """
  log_p = jax.nn.log_softmax(outputs['logits'])
  label = batch['label']
  confidence = jnp.exp(log_p.max(axis=-1))
  of_label = jnp.take_along_axis(log_p, jnp.maximum(label, 0)[:, None], axis=-1)[:, 0]
  return {
    **{key: batch[key] for key in ('domain', 'bad') if key in batch},
    'label': label,
    'prediction': log_p.argmax(axis=-1).astype(jnp.int32),
    'confidence': confidence,
    'known_score': outputs.get('known_score', confidence),
    'energy': jax.nn.logsumexp(outputs['logits'], axis=-1),
    'loss': jnp.where(label < 0, 0.0, -of_label),
  }
