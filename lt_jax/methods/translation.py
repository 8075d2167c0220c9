"""Image translation: training on the source in the style of the target."""

from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn

from lt_jax.errors import UserError
from lt_jax.losses.alignment import joined
from lt_jax.method import (
  Batch,
  Method,
  Metrics,
  Network,
  Outputs,
  Player,
  PyTree,
  State,
  check_streams,
  forward,
  mean_metric,
  named_players,
  tick,
)
from lt_jax.methods.adversarial import domain_loss, grad_reverse
from lt_jax.methods.pairs import apart, begin, forward_pair, held, together, update_all
from lt_jax.methods.supervised import Objective
from lt_jax.optim import Optimizer

Pixels = tuple[Sequence[float], Sequence[float]]
"""(mean, std) with which images were normalised."""


def low_amplitudes(source: jax.Array, target: jax.Array, *, beta: float) -> jax.Array:
  r"""Gives images the low-frequency amplitudes of others and keeps their phases.

  .. math::
    x = F^{-1}\big( (M |F t| + (1 - M) |F s|)\, e^{i \angle F s} \big), \qquad
    M_{jk} = [\, |j| \le b \wedge |k| \le b \,], \quad
    b = \max(1, \lfloor \beta \min(H, W) \rfloor)

  for every channel. For small images such as digits, beta times the side is often below
  one, and some implementations then swap only the mean, or nothing; here the window
  always includes the lowest frequencies. As in the authors' code, nothing is clipped.

  Args:
    source: (B, H, W, C), on any scale where black is 0. Images from which a constant
      has been subtracted would have other amplitudes, because the mean is one of them.
    target: (B, H, W, C) on the same scale, one for each source image.
    beta: in (0, 0.5).

  Returns:
    (B, H, W, C).

  Yang and Soatto, "FDA: Fourier Domain Adaptation for Semantic Segmentation", CVPR
  2020, arXiv 2004.05498, equation 3.
  """
  _, height, width, _ = source.shape
  side = min(height, width)
  most = min(max(1, int(beta * side)), (side - 1) // 2)
  waves = [_waves(size, most, source.dtype) for size in (height, width)]

  # Matrix products compute the few frequencies of the window; unlike with an FFT, each
  # device then computes those of its own images.
  def spectrum(images: jax.Array) -> jax.Array:
    return _product('bhwc,hj,wk->bjkc', images, *waves)

  of_source, of_target = spectrum(source), spectrum(target)
  phase = jnp.exp(1j * jnp.angle(of_source))
  change = jnp.abs(of_target) * phase - of_source
  back = _product('bjkc,hj,wk->bhwc', change, *(wave.conj() for wave in waves))
  return source + back.real / (height * width)


def _waves(size: int, most: int, dtype: jnp.dtype) -> jax.Array:
  """Returns exp(-2 pi i x k / size), (pixels x, frequencies k from -most to most)."""
  angles = np.outer(np.arange(size), np.arange(-most, most + 1)) / size
  waves = np.exp(-2j * np.pi * angles)
  return jnp.asarray(waves, jnp.result_type(dtype, jnp.complex64))


def _product(spec: str, *factors: jax.Array) -> jax.Array:
  return jnp.einsum(spec, *factors, precision=lax.Precision.HIGHEST)


def fda(
  method: Method,
  *,
  pixels: Mapping[str, Pixels],
  streams: Collection[str],
  beta: float = 0.09,
) -> Method:
  """Trains a method on source images in the style of target images (FDA).

  Each image of the batch 'train' takes the amplitudes of an image of the batch
  'target', see `low_amplitudes`, on the scale where black is 0 and white is 1, and is
  then normalised like the target's images. This learns nothing, and predictions are
  those of the method.

  Args:
    method: the method, which may or may not read the stream 'target' itself.
    pixels: stream -> (mean, std) with which its images are normalised.
    streams: names of the streams; it reads 'target'.
    beta: size of the window as a share of the image's side; 0.01 to 0.09 in the paper.

  Raises:
    UserError: beta is out of range, or there is no target.
  """
  if not 0 < beta < 0.5:
    raise UserError(f'fda: beta must be between 0 and 0.5, got {beta}')
  if 'target' not in streams:
    raise UserError("fda reads a stream 'target': set streams.target")

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    batch = batches['train']
    source, target = (
      raw(batches[name]['image'], *pixels[name]) for name in ('train', 'target')
    )
    # This keeps the order, so that images stay on their device.
    chosen = np.arange(len(source)) * len(target) // len(source)
    styled = low_amplitudes(source, target[chosen], beta=beta)
    images = normalised(styled, *pixels['target'])
    return method.step(state, {**batches, 'train': {**batch, 'image': images}})

  return method._replace(step=step)


def raw(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """Undoes `normalised`: returns images (B, H, W, C) in which white is 1."""
  return images * _channels(std) + _channels(mean)


def normalised(
  images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """Returns (x - mean) / std of images (B, H, W, C) in which white is 1."""
  return (images - _channels(mean)) / _channels(std)


def _channels(values: Sequence[float]) -> jax.Array:
  return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)


WRAPPERS = {'fda': fda}

DECODERS = ('source_decoder', 'target_decoder')
JUDGES = ('source_images', 'target_images')


def i2i(
  net: Network,
  optimizer: Optimizer,
  *,
  objective: Objective,
  players: Mapping[str, Player],
  align_on: Sequence[str],
  alignment_weight: Callable[[jax.Array], jax.Array],
  streams: Collection[str],
  image_shape: Sequence[int],
  pixels: Mapping[str, Pixels],
  identity: float = 1.0,
  images: float = 1.0,
  cycle: float = 1.0,
  translated: float = 1.0,
) -> Method:
  r"""Classifies by features from which images of either domain can be generated.

  .. math::
    L_c + L_z
    &+ w_{id} \big( |g_S f x - x| + |g_T f y - y| \big)
    + w_{tr}\, L_{tr} \\
    &+ w_{cyc} \big( |g_S f g_T f x - x| + |g_T f g_S f y - y| \big)
    + w_{trc}\, L_c(h f g_T f x)

  with the encoder f and the classifier h of the network, decoders g of the source and
  the target, source images x, target images y, and means over pixels. L_z is the loss
  of `lt_jax.methods.adversarial.dann` on the decoded features, with its gradient
  reversed and scaled by lambda(p). For L_tr each domain has a discriminator between its
  images and those translated into it; f and g minimise the cross-entropy of being taken
  for real images, also scaled by lambda(p). All discriminators train with weight 1.

  A term whose weight is 0 is not computed and has no players. Without all four it is
  `dann`; without L_z it has no 'discriminator'; images, cycle and translated are the
  terms of CyCADA, trained together. The paper, like `adda`, has an encoder for each
  domain; here there is one. Most of the paper's experiments share its last layers, too.

  The batches are 'train', of the source, and 'target', which needs no labels.

  Args:
    net: returns a dict with 'logits', 'features' and further named layers. Batch
      statistics of translated images are not remembered.
    optimizer: for the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), for the source and its
      translations.
    players: those that the terms need: 'discriminator', from (B, D) to logits (B,);
      'source_decoder' and 'target_decoder', from (B, D) to images; 'source_images' and
      'target_images', from images to logits (B,) of being real.
    align_on: names of the layers that are concatenated and decoded.
    alignment_weight: step -> lambda, see `lt_jax.losses.alignment.make_weight`.
    streams: names of the streams; it reads 'target'.
    image_shape: (H, W, C).
    pixels: stream -> (mean, std) with which its images are normalised.
    identity: w_id.
    images: w_tr.
    cycle: w_cyc.
    translated: w_trc.

  Returns:
    The method. If it has decoders, its outputs have 'as_source' and 'as_target',
    (B, H, W, C): every image translated to each domain, on the scale where white is 1.

  Raises:
    UserError: a player is missing or unused, or there is no layer to decode.

  Murez et al., "Image to Image Translation for Domain Adaptation", CVPR 2018, arXiv
  1712.00479.
  """
  weights = {'identity': identity, 'cycle': cycle, 'translated': translated}
  decodes = images or any(weights.values())
  needed = [*(DECODERS if decodes else ()), *(JUDGES if images else ())]
  if 'discriminator' in players or not decodes:
    needed.append('discriminator')
  named_players(players, *needed)
  if not align_on:
    raise UserError('i2i needs alignment.align_on, the layer to decode')
  check_streams(streams, 'target')
  shape = tuple(image_shape)
  players = {
    name: p._replace(net=p.net.clone(shape=shape)) if name in DECODERS else p
    for name, p in players.items()
  }

  def encode(params: PyTree, stats: PyTree, x: jax.Array, train: bool) -> Outputs:
    return forward(net, params['net'], stats['net'], x, train=train)[0]

  def play(name: str, params: PyTree, x: jax.Array) -> jax.Array:
    return players[name].net.apply({'params': params[name]}, x)

  def judged(name: str, params: PyTree, false: jax.Array, true: jax.Array):
    logits = play(name, params, together(false, true))
    loss, metrics = domain_loss(*apart(logits, len(false)))
    return loss, {key.replace('domain', name): value for key, value in metrics.items()}

  def deceive(name: str, params: PyTree, drawn: jax.Array) -> jax.Array:
    fixed = lax.stop_gradient(params[name])
    return nn.softplus(-play(name, {name: fixed}, drawn)).mean()

  def loss(params: PyTree, state: State, batches: Mapping[str, Batch]):
    params = held(params, optimizer, players)
    batch, x, y = batches['train'], *(batches[n]['image'] for n in ('train', 'target'))
    source, target, stats = forward_pair(
      net, params['net'], state.stats, x, y, statistics='joint'
    )
    total, metrics = objective(source, batch, state.step)
    metrics = {'loss': mean_metric(total)} | metrics
    scale = alignment_weight(state.step)
    metrics['lambda'] = mean_metric(scale)
    z_x, z_y = (joined(outputs, align_on) for outputs in (source, target))
    if 'discriminator' in players:
      both = (grad_reverse(z, scale) for z in (z_x, z_y))
      value, found = judged('discriminator', params, *both)
      total, metrics = total + value, metrics | found
    if not decodes:
      return total, (stats, metrics)
    terms = {}
    if identity:
      terms['identity'] = _distance(play('source_decoder', params, z_x), x)
      terms['identity'] += _distance(play('target_decoder', params, z_y), y)
    x_there = play('target_decoder', params, z_x)
    y_there = play('source_decoder', params, z_y)
    if images:
      pairs = {'target_images': (x_there, y), 'source_images': (y_there, x)}
      for name, (false, true) in pairs.items():
        value, found = judged(name, params, lax.stop_gradient(false), true)
        total, metrics = total + value, metrics | found
        total += images * scale * deceive(name, params, false)
    if cycle or translated:
      again = encode(params, stats, x_there, True)
      if translated:
        terms['translated'], _ = objective(again, batch, state.step)
    if cycle:
      other = joined(encode(params, stats, y_there, True), align_on)
      back = play('source_decoder', params, joined(again, align_on))
      terms['cycle'] = _distance(back, x)
      terms['cycle'] += _distance(play('target_decoder', params, other), y)
    for name, value in terms.items():
      total += weights[name] * value
      metrics[name] = mean_metric(value)
    return total, (stats, metrics)

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    grads, (stats, metrics) = jax.grad(loss, has_aux=True)(state.params, state, batches)
    state, norms = update_all(state, grads, optimizer, players)
    return tick(state.replace(stats=stats)), metrics | norms

  def reads(outputs: Outputs) -> dict[str, jax.Array]:
    z = joined(outputs, align_on)
    image = jnp.zeros((1, *shape))
    return {name: image if name in JUDGES else z for name in players}

  def predict(state: State, x: jax.Array) -> Outputs:
    outputs = encode(state.params, state.stats, x, False)
    if not decodes:
      return outputs
    z = joined(outputs, align_on)
    drawn = [play(name, state.params, z) for name in DECODERS]
    return outputs | {
      'as_source': raw(drawn[0], *pixels['train']),
      'as_target': raw(drawn[1], *pixels['target']),
    }

  init = begin(net, optimizer, reads, statistics='joint', players=players)
  return Method(init, step, predict)


def _distance(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the mean absolute difference of images."""
  return jnp.abs(a - b).mean()
