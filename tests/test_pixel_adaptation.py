"""Adaptation of pixels: losses follow their formulas, and steps do what they should."""

import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lt_jax import sharding
from lt_jax.errors import UserError, construct
from lt_jax.losses import make_loss, mean
from lt_jax.losses.alignment import (
  class_prior,
  make_alignment,
  make_weight,
  minent,
  self_information,
)
from lt_jax.method import Player, forward
from lt_jax.methods import METHODS
from lt_jax.methods.advent import JUDGES
from lt_jax.methods.mean_teacher import half_of_classes
from lt_jax.methods.supervised import make_objective
from lt_jax.optim import adam, sgd
from lt_jax.schedules import make_schedule

CLASSES = 4
COUNTS = np.array([50, 30, 15, 5])
LAYERS = ('logits', 'auxiliary_logits')


# Losses, in float64.


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def numeric_gradient(function, x, step=1e-6):
  """Central differences of a scalar function, one entry at a time."""
  grad = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    ends = []
    for sign in (1, -1):
      moved = x.copy()
      moved[index] += sign * step
      ends.append(function(moved))
    grad[index] = (ends[0] - ends[1]) / (2 * step)
  return grad


def entropies(z):
  """Entropy of every pixel (T, N) divided by log C, with loops."""
  p = softmax(z).reshape(len(z), -1, z.shape[-1])
  most = np.log(z.shape[-1])
  return np.array([[-sum(q * np.log(q) for q in n) / most for n in i] for i in p])


def hinge(z, mu=0.5):
  p = softmax(z).reshape(len(z), -1, z.shape[-1]).mean(1)
  wanted = mu * COUNTS / COUNTS.sum()
  below = [[max(0, w - q) for w, q in zip(wanted, i, strict=True)] for i in p]
  return np.mean(np.sum(below, axis=1))


def entropy_gradient(z):
  """Gradient of the mean entropy over log C: -p (log p + H) / (N log C)."""
  p = softmax(z)
  h = -(p * np.log(p)).sum(-1, keepdims=True)
  return -p * (np.log(p) + h) / (np.log(z.shape[-1]) * p[..., 0].size)


def test_minent_and_its_gradient_are_the_formulas(rng):
  z, other = (2 * rng.normal(size=(2, 3, 4, CLASSES)) for _ in range(2))

  def ours(z, **options):
    outputs = {'logits': z, 'auxiliary_logits': other}
    return minent({}, outputs, counts=COUNTS, **{'layers': LAYERS} | options)

  with jax.enable_x64(True):
    z64 = jnp.asarray(z)
    value, grad = jax.value_and_grad(ours)(z64)
    np.testing.assert_allclose(
      value, entropies(z).mean() + 0.2 * entropies(other).mean(), rtol=1e-9
    )
    np.testing.assert_allclose(grad, entropy_gradient(z), rtol=1e-9, atol=1e-12)
    hardest, grad = jax.value_and_grad(
      functools.partial(ours, hardest=0.3, layers=('logits',))
    )(z64)
    sorted_up = np.sort(entropies(z), axis=1)  # 4 of 12 pixels are 0.3, rounded up
    np.testing.assert_allclose(hardest, sorted_up[:, -4:].mean(), rtol=1e-9)
    chosen = (entropies(z) >= sorted_up[:, -4:-3]).reshape(z.shape[:-1])
    np.testing.assert_allclose(
      grad, entropy_gradient(z) * 3 * chosen[..., None], rtol=1e-9, atol=1e-12
    )
    with_prior = ours(z64, prior=2.0, layers=('logits',))
    expected = entropies(z).mean() + 2 * hinge(z)
    np.testing.assert_allclose(with_prior, expected, rtol=1e-9)


def test_the_prior_of_classes_and_its_gradient(rng):
  z = 3 * rng.normal(size=(2, 2, 3, CLASSES)) + [3.0, 0, 0, -6]

  def ours(z, mu):
    return class_prior({}, {'logits': z}, layers=('logits',), counts=COUNTS, mu=mu)

  with jax.enable_x64(True):
    for mu in (0.5, 1.0):
      value, grad = jax.value_and_grad(ours)(jnp.asarray(z), mu)
      np.testing.assert_allclose(value, hinge(z, mu), rtol=1e-9)
      expected = numeric_gradient(lambda z, mu=mu: hinge(z, mu), z)
      np.testing.assert_allclose(grad, expected, atol=1e-9)
      assert value > 0.01


def test_maps_of_information_at_their_ends(rng):
  """Zero for certain predictions, sum 1 for uniform ones, and finite gradients."""
  logits = jnp.asarray([[1e4, 0, 0], [0, 0, 0], [-1e4, 0, 1e4]], jnp.float32)
  found = self_information(logits)
  np.testing.assert_allclose(found.sum(-1), [0, 1, 0], atol=1e-6)
  for dtype in ('float32', 'bfloat16'):
    grad = jax.grad(lambda z: self_information(z).sum())(logits.astype(dtype))
    assert np.isfinite(np.asarray(grad, np.float32)).all()
  z = rng.normal(size=(5, 7))
  with jax.enable_x64(True):
    p = softmax(z)
    np.testing.assert_allclose(
      self_information(jnp.asarray(z)), -p * np.log2(p) / np.log2(7), rtol=1e-9
    )


def test_an_auxiliary_output_has_the_same_loss():
  rng = np.random.default_rng(3)
  outputs = {name: jnp.asarray(rng.normal(size=(2, 3, 3, CLASSES))) for name in LAYERS}
  batch = {'label': jnp.asarray(rng.integers(-1, CLASSES, (2, 3, 3)))}
  plain = make_loss('cross_entropy', COUNTS)
  both = make_loss('cross_entropy', COUNTS, auxiliary=0.1)(outputs, batch)
  other = plain({'logits': outputs['auxiliary_logits']}, batch)
  np.testing.assert_allclose(both, plain(outputs, batch) + 0.1 * other, rtol=1e-6)
  assert (np.asarray(both)[np.asarray(batch['label']) < 0] == 0).all()
  one = {'logits': outputs['logits']}
  with pytest.raises(UserError, match="layer of this network 'auxiliary_logits'"):
    make_loss('cross_entropy', COUNTS, auxiliary=0.1)(one, batch)


# Methods.


class Pixels(nn.Module):
  """Two layers of logits for every pixel, from its surroundings."""

  @nn.compact
  def __call__(self, images, *, train):
    x = nn.Conv(6, (3, 3))(images)
    x = nn.relu(nn.BatchNorm(not train)(x))
    outputs = {'logits': nn.Conv(CLASSES, (1, 1))(x), 'features': x.mean((1, 2))}
    return outputs | {'auxiliary_logits': nn.Conv(CLASSES, (1, 1))(x)}


class Judge(nn.Module):
  """A discriminator of small maps."""

  @nn.compact
  def __call__(self, maps):
    return nn.Conv(1, (2, 2), (2, 2), padding='VALID')(maps)[..., 0]


def batches_of(source=4, target=4, side=6, seed=0):
  rng = np.random.default_rng(seed)
  label = rng.integers(-1, CLASSES, (source, side, side))
  images = [rng.normal(size=(n, side, side, 3)) for n in (source, target)]
  images[0] += label[..., None]
  images[1] = 0.5 * images[1] + 1
  return {
    'train': {
      'image': jnp.asarray(images[0], jnp.float32),
      'label': jnp.asarray(label, jnp.int32),
    },
    'target': {'image': jnp.asarray(images[1], jnp.float32)},
  }


def rate(base):
  return make_schedule('constant', base, length=1, batch=1)


PIXELS = {'train': ((0.4,), (0.5,)), 'target': ((0.6,), (0.25,))}


def made(name, *, align_on=LAYERS, weight=0.1, alignment='none', **given):
  """Returns a method, given the context that a run would give it."""
  players = {
    judge: Player(Judge(), sgd(rate(0.3), momentum=0.0))
    for judge in (JUDGES[: len(align_on)] if name == 'advent' else ())
  }
  options = {'players': players, 'optimizer': sgd(rate(0.1), momentum=0.0)} | given
  parts = {
    'loss': make_loss('cross_entropy', COUNTS),
    'class_weights': lambda step: jnp.ones(CLASSES),
    'reduction': mean,
    'penalty': None,
  }
  context = {key: options.pop(key) for key in ('players', 'optimizer')}
  return construct(
    METHODS,
    'method',
    name,
    Pixels(),
    context['optimizer'],
    options=options,
    **parts,
    objective=make_objective(**parts),
    streams=('train', 'target'),
    pixels=PIXELS,
    alignment=make_alignment(
      alignment,
      align_on=align_on,
      weight=weight,
      counts=COUNTS,
      progress=lambda step: step / 10,
    ),
    align_on=align_on,
    alignment_weight=make_weight(weight, lambda step: step / 10),
    players=context['players'],
  )


def close(a, b, **tolerances):
  tolerances = {'rtol': 1e-4, 'atol': 1e-5} | tolerances
  jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerances), a, b)


def cross_entropy(logits, labels):
  """Mean over the labelled pixels."""
  p = jax.nn.log_softmax(logits)
  each = -jnp.take_along_axis(p, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
  return jnp.where(labels >= 0, each, 0)


@pytest.mark.parametrize(
  ('shown', 'prior'),
  [
    ('self_information', True),
    pytest.param('softmax', False, marks=pytest.mark.slow),
  ],
)
def test_advent_fools_discriminators_that_learn_from_the_same_maps(shown, prior):
  """Source and target differ in size; all players are updated at once."""
  batches = batches_of(4, 2)
  batches['target'] = batches_of(2, 2, side=8, seed=1)['target']
  alignment = 'class_prior' if prior else 'none'
  method = made('advent', shown=shown, alignment=alignment)
  state = jax.jit(method.init)(jax.random.key(0), batches)

  def maps(outputs, layer):
    p = jax.nn.softmax(outputs[layer])
    return p if shown == 'softmax' else -p * jnp.log2(p) / 2  # log2 of 4 classes

  def probability(params, x):
    """Probability of being a patch of the target."""
    return jax.nn.sigmoid(Judge().apply({'params': params}, x))

  def losses(net, judges):
    source, target = (
      forward(Pixels(), net, state.stats['net'], batches[n]['image'], train=True)[0]
      for n in ('train', 'target')
    )
    labels = batches['train']['label']
    value = cross_entropy(source['logits'], labels).sum() / (labels >= 0).sum()
    own = value
    of_judges = 0
    for name, layer, weight in zip(JUDGES, LAYERS, (1.0, 0.2), strict=True):
      of_source, of_target = (
        probability(judges[name], maps(o, layer)) for o in (source, target)
      )
      own += 0.1 * weight * -jnp.log(1 - of_target).mean()
      of_judges -= (jnp.log(1 - of_source).mean() + jnp.log(of_target).mean()) / 2
      if prior:
        p = jax.nn.softmax(target[layer]).mean((1, 2))
        wanted = jnp.asarray(COUNTS / COUNTS.sum() / 2, jnp.float32)[None]
        own += 0.1 * weight * jnp.maximum(0, wanted - p).sum(1).mean()
    return own, of_judges, value

  judges = {name: state.params[name] for name in JUDGES}
  net = state.params['net']

  @jax.jit
  def by_hand(net, judges):
    of_net = jax.grad(lambda net: losses(net, judges)[0])(net)
    of_judges = jax.grad(lambda judges: losses(net, judges)[1])(judges)
    return of_net, of_judges, losses(net, judges)[2]

  of_net, of_judges, value = by_hand(net, judges)
  after, metrics = jax.jit(method.step)(state, batches)
  close(after.params['net'], jax.tree.map(lambda p, g: p - 0.1 * g, net, of_net))
  for name, params in judges.items():
    close(
      after.params[name],
      jax.tree.map(lambda p, g: p - 0.3 * g, params, of_judges[name]),
    )
  close(metrics['loss'][0], value)
  assert {'lambda', 'adversarial', 'auxiliary_adversarial'} <= metrics.keys()
  assert metrics['domain_accuracy'][1] == 4 * 9 + 2 * 16  # patches
  assert ('alignment' in metrics) == prior
  assert int(after.step) == 1


def test_half_of_the_classes_of_an_image():
  rng = np.random.default_rng(0)
  labels = rng.integers(-1, CLASSES, (64, 5, 5))
  labels[0] = -1
  labels[1] = 2
  labels[2:40, :, :2] = 1
  mask = np.asarray(half_of_classes(jax.random.key(0), jnp.asarray(labels), CLASSES))
  kept = set()
  for image, chosen in zip(labels, mask, strict=True):
    present = set(image[image >= 0].tolist())
    inside = set(image[chosen].tolist())
    assert len(inside) == (len(present) + 1) // 2 and -1 not in inside
    assert chosen.sum() == np.isin(image, list(inside)).sum()  # whole classes
    kept |= {frozenset(inside)}
  assert len(kept) > 4  # and not always the same ones
  again = half_of_classes(jax.random.key(1), jnp.asarray(labels), CLASSES)
  assert (np.asarray(again) != mask).any()


@pytest.mark.parametrize(
  ('trust', 'mix'),
  [('share', True), pytest.param('pixel', False, marks=pytest.mark.slow)],
)
def test_a_mean_teacher_labels_what_the_student_sees_changed(trust, mix):
  batches = batches_of(4, 4)
  options = {'trust': trust, 'mix': mix, 'threshold': 0.3, 'decay': 0.6}
  method = made('mean_teacher', jitter=0.0, weight=0.5, **options)
  init, step = jax.jit(method.init), jax.jit(method.step)
  state = init(jax.random.key(0), batches)

  def pseudo(net, teacher, state):
    images = batches['target']['image']
    out, _ = forward(Pixels(), teacher['params'], teacher['stats'], images, train=False)
    p = jax.nn.softmax(out['logits'])
    labels, sure = p.argmax(-1), p.max(-1) >= 0.3
    weights = sure if trust == 'pixel' else jnp.full(sure.shape, sure.mean())
    seen = images
    if mix:
      key = jax.random.fold_in(state.key, zlib.crc32(b'mixed_classes'))
      key = jax.random.fold_in(key, state.step)
      true = batches['train']['label']
      mask = half_of_classes(key, true, CLASSES)
      brought = (batches['train']['image'] * 0.5 + 0.4 - 0.6) / 0.25
      seen = jnp.where(mask[..., None], brought, images)
      labels = jnp.where(mask, true, labels)
      weights = jnp.where(mask, 1.0, weights)
    out, _ = forward(Pixels(), net, state.stats['net'], seen, train=True)
    return (weights * cross_entropy(out['logits'], labels)).mean(), sure.mean()

  @jax.jit
  def by_hand(state, teacher):
    def whole(net):
      images, labels = batches['train']['image'], batches['train']['label']
      out, _ = forward(Pixels(), net, state.stats['net'], images, train=True)
      own = cross_entropy(out['logits'], labels).sum() / (labels >= 0).sum()
      other, sure = pseudo(net, teacher, state)
      return own + 0.5 * other, (other, sure)

    return jax.grad(whole, has_aux=True)(state.params['net'])

  teacher, shares = None, (0.0, 0.5, 0.6)  # 1 - 1 / (t + 1), at most the decay
  for t, share in enumerate(shares):
    now = {'params': state.params['net'], 'stats': state.stats['net']}
    teacher = (
      now
      if not t
      else jax.tree.map(lambda old, new, a=share: a * old + (1 - a) * new, teacher, now)
    )
    grads, (other, sure) = by_hand(state, teacher)
    after, metrics = step(state, batches)
    close(
      after.params['net'],
      jax.tree.map(lambda p, g: p - 0.1 * g, state.params['net'], grads),
    )
    close(after.memory['teacher'], teacher)
    close(metrics['pseudo_loss'][0], other)
    close(metrics['labelled'][0] / metrics['labelled'][1], sure)
    assert 0 < float(sure) < 1
    state = after
  predicted = jax.jit(method.predict)(state, batches['target']['image'])['logits']
  plain = jax.jit(functools.partial(forward, Pixels(), train=False))
  expected, _ = plain(
    state.params['net'], state.stats['net'], batches['target']['image']
  )
  close(predicted, expected['logits'])


def test_colours_change_and_labels_do_not():
  """The source's objective stays, and two steps change colours differently."""
  batches = batches_of()
  losses = {}
  for jitter in (0.0, 0.5):
    method = made('mean_teacher', jitter=jitter, threshold=0.0, mix=False, weight=1.0)
    state = jax.jit(method.init)(jax.random.key(0), batches)
    _, metrics = jax.jit(method.step)(state, batches)
    losses[jitter] = metrics
  close(losses[0.0]['loss'][0], losses[0.5]['loss'][0])
  assert abs(losses[0.0]['pseudo_loss'][0] - losses[0.5]['pseudo_loss'][0]) > 1e-4


@functools.cache
def two_steps(devices, name):
  """Parameters after two steps on some devices."""
  method = made(name, **({'threshold': 0.3} if name == 'mean_teacher' else {}))
  mesh = sharding.make_mesh(devices)
  batches = batches_of(8, 8)
  state = jax.jit(method.init)(jax.random.key(0), batches)
  state = sharding.put_replicated(mesh, state)
  batches = sharding.put_batch(mesh, jax.tree.map(np.asarray, batches), leading=0)
  step = jax.jit(method.step).lower(state, batches).compile()
  for _ in range(2):
    state, _ = step(state, batches)
  return jax.device_get(state.params), step.as_text()


@pytest.mark.slow  # tests/test_adaptation.py does so for a method of whole images
@pytest.mark.parametrize('devices', [2, 8])
@pytest.mark.parametrize('name', ['advent', 'mean_teacher'])
def test_many_devices_are_one(name, devices):
  """And only sums are exchanged, no images or maps."""
  (one, _), (many, text) = (two_steps(n, name) for n in (1, devices))
  close(many, one, rtol=2e-3, atol=2e-5)
  assert 'all-reduce' in text
  assert not re.findall(r'all-gather|all-to-all|collective-permute', text)


@pytest.mark.parametrize(
  'name', ['advent', pytest.param('mean_teacher', marks=pytest.mark.slow)]
)
def test_it_descends_and_is_traced_once(name):
  batches, traces = batches_of(), []
  options = {'optimizer': adam(rate(0.05)), 'weight': 0.01}
  method = made(name, **options)

  @jax.jit
  def step(state, batches):
    traces.append(1)
    return method.step(state, batches)

  state, losses = jax.jit(method.init)(jax.random.key(0), batches), []
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for _ in range(60):
    state, metrics = step(state, batches)
    losses.append(float(metrics['loss'][0]))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
  assert len(traces) == 1 and np.isfinite(losses).all()
  assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
  ('name', 'given', 'message'),
  [
    ('advent', {'align_on': ()}, 'reads one or two layers'),
    ('advent', {'players': {}}, "needs a player 'discriminator'"),
    ('advent', {'weights': (1.0,)}, 'advent has 1 weights for the 2 layers'),
    ('advent', {'shown': 'soft'}, "map to show a discriminator 'soft'; did you mean"),
    ('mean_teacher', {'decay': 1.0}, r'decay must be in \[0, 1\), got 1.0'),
    ('mean_teacher', {'trust': 'all'}, "way to trust a teacher 'all'"),
  ],
)
def test_mistakes_are_reported_when_it_is_built(name, given, message):
  with pytest.raises(UserError, match=message):
    made(name, **given)


def test_mistakes_that_shapes_tell():
  batches = batches_of()
  batches['target'] = batches_of(side=8)['target']
  method = made('mean_teacher')
  state = jax.eval_shape(method.init, jax.random.key(0), batches)
  with pytest.raises(UserError, match=r'one size, not of \(6, 6\) and \(8, 8\)'):
    jax.eval_shape(method.step, state, batches)
  with pytest.raises(UserError, match='hardest must be more than 0'):
    minent({}, {}, layers=('logits',), counts=COUNTS, hardest=0.0)
