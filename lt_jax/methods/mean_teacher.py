"""Self-training with a teacher: an average of the network labels target images."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn

from lt_jax.data.augment import colour_jitter
from lt_jax.errors import UserError, lookup
from lt_jax.method import (
  Batch,
  Method,
  Metrics,
  Network,
  PyTree,
  State,
  check_streams,
  forward,
  mean_metric,
  named_key,
  predictor,
  tick,
)
from lt_jax.methods.pairs import (
  STATISTICS,
  begin,
  forward_pair,
  held,
  update_all,
)
from lt_jax.methods.supervised import Loss, Objective
from lt_jax.methods.translation import Pixels, normalised, raw
from lt_jax.optim import Optimizer


def by_share(confident: jax.Array) -> jax.Array:
  """Weights every pixel by the confident share of the batch, as DAFormer does."""
  return jnp.full(confident.shape, confident.astype(jnp.float32).mean())


def by_pixel(confident: jax.Array) -> jax.Array:
  """Counts confident pixels only."""
  return confident.astype(jnp.float32)


TRUST: dict[str, Callable[[jax.Array], jax.Array]] = {
  'share': by_share,
  'pixel': by_pixel,
}
"""name -> function from (T, ...) bool, whether a label is confident, to weights."""


class Mixed(NamedTuple):
  """What the student is trained on, besides the source.

  Attributes:
    image: (T, H, W, channels), normalised like the target's images.
    label: (T, ...) int32.
    weight: (T, ...) float32.
  """

  image: jax.Array
  label: jax.Array
  weight: jax.Array


def mean_teacher(
  net: Network,
  optimizer: Optimizer,
  *,
  objective: Objective,
  loss: Loss,
  alignment_weight: Callable[[jax.Array], jax.Array],
  streams: Collection[str],
  pixels: Mapping[str, Pixels],
  statistics: str = 'separate',
  decay: float = 0.999,
  threshold: float = 0.968,
  trust: str = 'share',
  mix: bool = True,
  jitter: float = 0.2,
) -> Method:
  r"""Learns from the source's labels, and from a teacher's labels for the target.

  .. math::
    L_y + \frac{\lambda(p)}{N} \sum_n q_n\, \ell(\tilde x, \tilde y)_n, \qquad
    \hat y_n = \arg\max_c \bar p_n(c), \qquad
    \bar\theta_t = a_t \bar\theta_{t-1} + (1 - a_t)\, \theta_t, \quad
    a_t = \min\big(1 - \tfrac{1}{t + 1},\, a\big)

  over the N labels of a target batch. The teacher's parameters and statistics are
  averages of the network's. It labels target images as they are; the student sees them
  changed: onto each, the pixels of half of the classes of a source image, drawn anew in
  every step, are pasted with their true labels, and colours are jittered. Pixels do not
  move, so the labels stay valid. q is 1 where a pixel is pasted. Elsewhere it is the
  share of the batch for which the teacher's probability reaches the threshold
  ('share'), or 1 where it does and 0 where it does not ('pixel').

  The teacher starts as the network of the first step, after any surgery. Predictions
  come from the network, not from its teacher. The metric 'labelled' is the share of
  labels that reach the threshold.

  Args:
    net: returns a dict with 'logits' (B, ..., C).
    optimizer: for the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), for the source.
    loss: (outputs, batch) -> (T, ...); it ignores the label -1.
    alignment_weight: step -> lambda, see `lt_jax.losses.alignment.make_weight`.
    streams: names of the streams; it reads 'target'.
    pixels: stream -> (mean, std) with which its images are normalised.
    statistics: how the source and the changed images share batch normalisation, a key
      of `lt_jax.methods.pairs.STATISTICS`.
    decay: a, in [0, 1).
    threshold: for the probability of the teacher's label.
    trust: a key of `TRUST`.
    mix: whether to paste pixels of the source, which needs label maps, and images of
      one size in both domains.
    jitter: strength of the colour changes, see `colour_jitter`; 0 for none, which
      images without three channels need.

  Raises:
    UserError: a number is out of range, there is no target, or a name is unknown.

  The teacher: Tarvainen and Valpola, "Mean teachers are better role models", NIPS 2017,
  arXiv 1703.01780. Pasted classes: Tranheden et al., DACS, WACV 2021, arXiv 2007.08702.
  The whole: Hoyer et al., DAFormer, CVPR 2022, arXiv 2111.14887, without its blur and
  its ImageNet feature distance; its rare-class sampling is the sampler 'rare_class'.
  DAFormer changes the colours of four batches in five, here all are changed.
  """
  check_streams(streams, 'target')
  lookup(STATISTICS, 'kind of batch statistics', statistics)
  weigh = lookup(TRUST, 'way to trust a teacher', trust)
  for name, number in (('decay', decay), ('threshold', threshold)):
    if not 0 <= number < 1:
      raise UserError(f'mean_teacher: {name} must be in [0, 1), got {number}')
  begun = begin(net, optimizer, lambda outputs: {}, statistics=statistics, players={})

  def init(key: jax.Array, batches: Mapping[str, Batch]) -> State:
    state = begun(key, batches)
    first = jax.tree.map(jnp.zeros_like, _average_of(state))
    return state.replace(memory={'teacher': first, 'updates': jnp.int32(0)})

  def taught(state: State) -> State:
    """Moves the teacher towards the current network."""
    t = state.memory['updates'].astype(jnp.float32)
    a = jnp.minimum(1 - 1 / (t + 1), decay)
    teacher = jax.tree.map(
      lambda old, new: (a * old + (1 - a) * new).astype(old.dtype),
      state.memory['teacher'],
      _average_of(state),
    )
    memory = {'teacher': teacher, 'updates': state.memory['updates'] + 1}
    return state.replace(memory=memory)

  def mixed(state: State, batches: Mapping[str, Batch]) -> tuple[Mixed, jax.Array]:
    """Returns what the student sees, and where the teacher is confident."""
    source, images = batches['train'], batches['target']['image']
    teacher = state.memory['teacher']
    outputs, _ = forward(net, teacher['params'], teacher['stats'], images, train=False)
    p = nn.softmax(outputs['logits'])
    label, confident = p.argmax(-1).astype(jnp.int32), p.max(-1) >= threshold
    seen = Mixed(raw(images, *pixels['target']), label, weigh(confident))
    if mix:
      _check_pixels(source, images, label)
      given, image = (_as_many(source[key], len(images)) for key in ('label', 'image'))
      image = raw(image, *pixels['train'])
      pasted = Mixed(image, given, jnp.ones_like(seen.weight))
      drawn_by = named_key(state.key, 'mixed_classes', state.step)
      mask = half_of_classes(drawn_by, given, p.shape[-1])
      seen = Mixed(
        *(
          jnp.where(mask[..., None] if ours.ndim > mask.ndim else mask, theirs, ours)
          for ours, theirs in zip(seen, pasted, strict=True)
        )
      )
    image = seen.image
    if jitter:
      colours = named_key(state.key, 'jitter', state.step)
      image = colour_jitter(colours, 255 * image, strength=jitter) / 255
    return seen._replace(image=normalised(image, *pixels['target'])), confident

  def objectives(
    params: PyTree, state: State, batch: Batch, seen: Mixed
  ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
    params = held(params, optimizer, {})
    source, target, stats = forward_pair(
      net,
      params['net'],
      state.stats,
      batch['image'],
      seen.image,
      statistics=statistics,
    )
    value, metrics = objective(source, batch, state.step)
    pseudo = (seen.weight * loss(target, {'label': seen.label})).mean()
    metrics |= {'loss': mean_metric(value), 'pseudo_loss': mean_metric(pseudo)}
    return value + alignment_weight(state.step) * pseudo, (stats, metrics)

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    state = taught(state)
    seen, confident = mixed(state, batches)
    grads, (stats, metrics) = jax.grad(objectives, has_aux=True)(
      state.params, state, batches['train'], seen
    )
    state, norms = update_all(state, grads, optimizer, {})
    labelled = confident.sum(dtype=jnp.float32), jnp.float32(confident.size)
    metrics |= {'labelled': labelled} | norms
    return tick(state.replace(stats=stats)), metrics

  return Method(init, step, predictor(net))


def _average_of(state: State) -> PyTree:
  """Returns the values that a teacher averages."""
  return {'params': state.params['net'], 'stats': state.stats['net']}


def _check_pixels(source: Batch, images: jax.Array, label: jax.Array) -> None:
  """Rejects what cannot be mixed: labels of whole images, images of different sizes."""
  if label.ndim != 3:
    raise UserError(
      'mean_teacher mixes images by the labels of pixels, but these are labels of '
      'whole images: set method.mix to False'
    )
  sizes = [x.shape[1:3] for x in (source['image'], images)]
  if sizes[0] != sizes[1]:
    raise UserError(
      f'mean_teacher mixes images of one size, not of {sizes[0]} and {sizes[1]}; crop '
      'both domains to one size, or set method.mix to False'
    )


def _as_many(x: jax.Array, count: int) -> jax.Array:
  """Resizes a batch (S, ...) by repeating or dropping images, keeping their order."""
  if len(x) == count:  # so that no image leaves its device
    return x
  return x[np.arange(count) * len(x) // count]


def half_of_classes(key: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
  """Returns the pixels of a random half of the classes in each image, rounded up.

  Args:
    key: random key.
    labels: (B, H, W) int; -1, no label, is never chosen.
    classes: C.

  Returns:
    (B, H, W) bool.

  Source: ClassMix, Olsson et al., arXiv 2007.07936, algorithm 1. Code that builds on it
  also treats the pixels without a label as a class.
  """
  # A comparison: a lookup would move images between devices.
  shown = labels[..., None] == jnp.arange(classes)[None, None, None]
  present = shown.any((1, 2))
  draws = jax.random.uniform(key, present.shape)
  order = jnp.where(present, draws, jnp.inf).argsort(axis=1).argsort(axis=1)
  chosen = order < (present.sum(1, keepdims=True) + 1) // 2
  return (shown & chosen[:, None, None]).any(-1)
