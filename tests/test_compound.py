"""Open compound domain adaptation: fusions, updates, stages, and their files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_domains
from lt_jax import build, run, sharding, trained
from lt_jax.config import resolve
from lt_jax.errors import UserError
from lt_jax.method import Player, forward, named_key
from lt_jax.methods import METHODS
from lt_jax.models.decoder import decoder
from lt_jax.models.discriminator import mlp
from lt_jax.models.fusion import FORMS, fusion
from lt_jax.models.heads import linear
from lt_jax.optim import adam, sgd
from lt_jax.schedules import make_schedule
from lt_jax.writers import read_rows
from tests import tiny
from tests.test_adaptation import CLASSES, batches_of, close, normalised_net, plain_net
from tests.test_memory import draw_like, numerical_gradient

D = 5


def rate(base):
  return make_schedule('constant', base, length=1, batch=1)


# Fusions.


def fused_by_numpy(form, params, v, m, d):
  """Returns features and logits, computed one image at a time."""

  def gate(x, name):
    return np.tanh(x @ params[name]['kernel'] + params[name]['bias'])

  added = {
    'selector': lambda v, m, d: gate(v, 'concept_selector') * m,
    'domain': lambda v, m, d: gate(v, 'domain_selector') * d,
    'released': lambda v, m, d: (
      gate(v, 'concept_selector') * m + 0.01 * gate(v, 'domain_selector') * d
    ),
    'paper': lambda v, m, d: gate(d, 'domain_selector') * m,
    'both': lambda v, m, d: (
      gate(d, 'domain_selector') * gate(v, 'concept_selector') * m
    ),
  }[form]
  x = np.stack([row[0] + added(*row) for row in zip(v, m, d, strict=True)])
  w = params['classifier']['kernel']
  length = np.linalg.norm(x, axis=1, keepdims=True)
  logits = 16 * x / (1 + length) @ (w / np.linalg.norm(w, axis=0))
  borrowed = np.linalg.norm(x - v, axis=1) / np.linalg.norm(v, axis=1)
  return x, logits, borrowed


@pytest.mark.parametrize('form', FORMS)
def test_fusions_and_their_gradients_are_their_formulas(form, rng):
  v, m, d = rng.normal(size=(3, 4, D))
  net = fusion(form=form).clone(num_classes=CLASSES)
  read = {'direct': v, 'memory': m, 'domain': d}
  with jax.enable_x64(True):
    shapes = jax.eval_shape(net.init, jax.random.key(0), read)['params']
    params = jax.device_get(draw_like(rng, shapes))
    found = net.apply({'params': params}, read)
    expected = fused_by_numpy(form, params, v, m, d)
    for name, value in zip(('features', 'logits', 'borrowed'), expected, strict=True):
      np.testing.assert_allclose(found[name], value, rtol=1e-9)
      assert found[name].dtype == jnp.float64
    weights = rng.normal(size=(4, CLASSES))

    def value(read):
      return (net.apply({'params': params}, read)['logits'] * weights).sum()

    grads = jax.grad(value)(read)
    for place, name in enumerate(read):
      parts = [v, m, d]

      def at(x, place=place, parts=parts):
        logits = fused_by_numpy(
          form, params, *(x if i == place else p for i, p in enumerate(parts))
        )[1]
        return (logits * weights).sum()

      np.testing.assert_allclose(
        grads[name], numerical_gradient(at, parts[place]), rtol=1e-6, atol=1e-8
      )
  assert net.reads_domain == (form != 'selector')
  assert len(FORMS) == 5


def test_an_unknown_form_of_fusion():
  with pytest.raises(UserError, match="form of fusion 'papre'; did you mean 'paper'"):
    fusion(form='papre')


# The steps.


def compound(net, form='paper', threshold=0.0, optimizer=None, judge=None):
  players = {
    'discriminator': judge or Player(mlp(hidden=(4,)), sgd(rate(0.3), momentum=0.0)),
    'fusion': Player(fusion(form=form), sgd(rate(0.2), momentum=0.0)),
  }
  return METHODS['compound'](
    net,
    optimizer or sgd(rate(0.1)),
    players=players,
    align_on=('logits',),
    streams=('train', 'target'),
    counts=np.ones(CLASSES),
    threshold=threshold,
  )


def with_centroids(state, seed=0):
  shape = state.params['centroids'].shape
  drawn = np.random.default_rng(seed).normal(size=shape)
  return state.replace(params=state.params | {'centroids': jnp.float32(drawn)})


def test_a_step_of_compound_is_its_two_updates():
  net, batches = plain_net(), batches_of(8, 4)
  method = compound(net)
  judge, fuse = mlp(hidden=(4,)), fusion().clone(num_classes=CLASSES)
  state = with_centroids(jax.jit(method.init)(jax.random.key(0), batches))
  assert {'source_net', 'domain_net', 'centroids'} <= set(state.params)
  assert set(state.opt) == {'net', 'fusion', 'discriminator'}

  def outputs(params, name):
    return forward(net, params, {}, batches[name]['image'], train=True)[0]

  @jax.jit
  def by_hand(params):
    source = outputs(params['source_net'], 'train')['logits']
    d = outputs(params['domain_net'], 'target')['features']

    def enriched(own):
      seen = outputs(own['net'], 'target')
      p = jax.nn.softmax(seen['logits'])
      read = sum(p[:, c, None] * params['centroids'][c][None] for c in range(CLASSES))
      read = {'direct': seen['features'], 'memory': read, 'domain': d}
      return fuse.apply({'params': own['fusion']}, read)

    def probability(judge_params, logits):
      return jax.nn.sigmoid(judge.apply({'params': judge_params}, logits))

    own = {name: params[name] for name in ('net', 'fusion')}

    def judged(judge_params):
      of_source = probability(judge_params, source)
      of_target = probability(judge_params, enriched(own)['logits'])
      right = (of_source < 0.5).sum() + (of_target > 0.5).sum()
      return -jnp.log(1 - of_source).mean() - jnp.log(of_target).mean(), right

    (domain, right), grads = jax.value_and_grad(judged, has_aux=True)(
      params['discriminator']
    )
    new = jax.tree.map(lambda p, g: p - 0.3 * g, params['discriminator'], grads)
    fooled, grads = jax.value_and_grad(
      lambda own: -jnp.log(1 - probability(new, enriched(own)['logits'])).mean()
    )(own)
    moved = {
      name: jax.tree.map(lambda p, g, r=r: p - r * g, own[name], grads[name])
      for name, r in (('net', 0.1), ('fusion', 0.2))
    }
    return {**params, **moved, 'discriminator': new}, domain, fooled, right

  expected, domain, fooled, right = by_hand(state.params)
  after, metrics = jax.jit(method.step)(state, batches)
  close(after.params, expected)
  close(metrics['domain_loss'][0], domain)
  close(metrics['loss'][0], fooled)
  share = float(right) / 12
  assert metrics['domain_accuracy'] == (right, 12)
  seen = jax.jit(method.predict)(after, batches['target']['image'])
  assert seen['borrowed'].shape == seen['target_logit'].shape == (4,)
  judged = judge.apply({'params': after.params['discriminator']}, seen['logits'])
  close(seen['target_logit'], judged)

  held = compound(net, threshold=share)  # not at the threshold itself
  now, metrics = jax.jit(held.step)(state, batches)
  assert metrics['moved'] == (0, 1)
  same = {'net': state.params['net'], 'fusion': state.params['fusion']}
  close({name: now.params[name] for name in same}, same, rtol=0, atol=0)
  close(now.params['discriminator'], expected['discriminator'])


def factor(net, threshold=0.0, oracle=False, optimizer=None):
  players = {'decoder': Player(decoder(width=2), sgd(rate(0.2), momentum=0.0))}
  if oracle:
    domains = Player(linear(3), sgd(rate(0.3), momentum=0.0))
    players['domain_classifier'] = domains
  return METHODS['domain_factor'](
    net,
    optimizer or sgd(rate(0.1)),
    players=players,
    streams=('train', 'target'),
    image_shape=(8, 8, 2),
    confusion=0.5,
    reconstruction=2.0,
    threshold=threshold,
  )


@pytest.mark.parametrize('oracle', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_of_domain_factor_is_its_two_updates(oracle):
  """With momentum, which would also move players that must not move."""
  net, batches = plain_net(), batches_of(8, 4)
  batches['target']['domain'] = jnp.array([0, 1, 1, 0])
  domains = np.array([*[0] * 8, 1, 2, 2, 1])
  method = factor(net, oracle=oracle)
  state = jax.jit(method.init)(jax.random.key(0), batches)
  assert ('domain_classifier' in state.params) == oracle
  images = jnp.concatenate([batches[name]['image'] for name in ('train', 'target')])
  draw = decoder(width=2).clone(shape=(8, 8, 2))

  def outputs(params):
    return forward(net, params, {}, images, train=True)[0]

  def cross_entropy(logits, labels):
    log_p = jax.nn.log_softmax(logits)
    return -log_p[jnp.arange(len(labels)), labels].mean()

  fixed = jax.jit(outputs)(state.params['class_net'])
  pseudo = np.asarray(fixed['logits'])[8:].argmax(1)
  labels = np.concatenate([batches['train']['label'], pseudo])
  (loss, right), grads = jax.jit(
    jax.value_and_grad(
      lambda p: (
        cross_entropy(outputs(p)['logits'], labels),
        (outputs(p)['logits'].argmax(1) == labels).sum(),
      ),
      has_aux=True,
    )
  )(state.params['net'])
  head = jax.tree.map(
    lambda p, g: p - 0.1 * g, state.params['net']['head'], grads['head']
  )

  def shaped(own, trunk, random):
    features = outputs({'trunk': trunk, 'head': head})['features']
    if oracle:
      logits = linear(3).apply({'params': own['domain_classifier']}, features)
      domain_term = cross_entropy(logits, domains)
    else:
      domain_term = cross_entropy(
        outputs({'trunk': trunk, 'head': head})['logits'], random
      )
    both = jnp.concatenate([fixed['features'], features], 1)
    off = jnp.abs(draw.apply({'params': own['decoder']}, both) - images)
    shown = jnp.where(off < 1, off**2 / 2, off - 0.5).mean()
    return 0.5 * domain_term + 2 * shown, (domain_term, shown)

  after, metrics = jax.jit(method.step)(state, batches)
  own = {n: p for n, p in state.params.items() if n in ('decoder', 'domain_classifier')}
  domain_term = metrics['domain_labels' if oracle else 'confusion'][0]
  trunk = state.params['net']['trunk']
  random = np.zeros(12, int)
  if not oracle:
    key = named_key(state.key, 'random_labels', 0)
    drawn = jax.random.randint(key, (12,), 0, CLASSES)
    # Blocks of two source images and one target image alternate.
    turns = np.arange(12).reshape(4, 3)
    order = np.concatenate([turns[:, :2].ravel(), turns[:, 2]])
    random = np.asarray(drawn)[order]
    assert len(set(random.tolist())) == CLASSES
  (value, parts), (of_own, of_trunk) = jax.jit(
    jax.value_and_grad(shaped, argnums=(0, 1), has_aux=True)
  )(own, trunk, random)
  close(domain_term, parts[0])
  close(metrics['reconstruction'][0], parts[1])
  close(metrics['loss'][0], value)
  close(metrics['discriminator_loss'][0], loss)
  assert metrics['accuracy'] == (right, 12)
  moved = jax.tree.map(lambda p, g: p - 0.1 * g, trunk, of_trunk)
  close(after.params['net'], {'trunk': moved, 'head': head})
  for name, own_rate in (('decoder', 0.2), ('domain_classifier', 0.3))[: 1 + oracle]:
    expected = jax.tree.map(lambda p, g, r=own_rate: p - r * g, own[name], of_own[name])
    close(after.params[name], expected)
  close(after.params['class_net'], state.params['class_net'], rtol=0, atol=0)
  if oracle:
    return
  share = float(right) / 12
  now, metrics = jax.jit(factor(net, threshold=share).step)(state, batches)
  assert metrics['moved'] == (0, 1)
  close(now.params['net'], {'trunk': trunk, 'head': head})
  close(now.params['decoder'], state.params['decoder'], rtol=0, atol=0)


def test_a_class_discriminator_at_chance_stops_pushing():
  """With training, domain features lose the classes but still show the images."""
  batches, net = batches_of(12, 12), plain_net()
  method = factor(net, optimizer=adam(rate(0.01)))
  step, traces = method.step, []

  @jax.jit
  def counted(state, batches):
    traces.append(1)
    return step(state, batches)

  state = jax.jit(method.init)(jax.random.key(0), batches)
  shapes, seen = jax.tree.map(lambda x: (x.shape, x.dtype), state), []
  for _ in range(60):
    state, metrics = counted(state, batches)
    seen.append({name: float(v / n) for name, (v, n) in metrics.items()})
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
  assert len(traces) == 1 and np.isfinite([row['loss'] for row in seen]).all()
  assert seen[-1]['reconstruction'] < seen[0]['reconstruction'] - 0.01
  assert seen[-1]['confusion'] < 1.3 * np.log(CLASSES)


@pytest.mark.slow
def test_the_target_moves_to_where_the_source_is():
  """With a waiting discriminator the loss falls, in a single program."""
  batches, traces = batches_of(), []
  judge = Player(mlp(hidden=(4,)), sgd(rate(0.0)))
  method = compound(plain_net(), optimizer=adam(rate(0.005)), judge=judge)

  @jax.jit
  def step(state, batches):
    traces.append(1)
    return method.step(state, batches)

  state = with_centroids(jax.jit(method.init)(jax.random.key(0), batches))
  shapes, losses = jax.tree.map(lambda x: (x.shape, x.dtype), state), []
  for _ in range(60):
    state, metrics = step(state, batches)
    losses.append(float(metrics['loss'][0]))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
  assert len(traces) == 1 and losses[-1] < losses[0] - 0.02


MADE = {
  'compound': functools.partial(compound, threshold=0.01),
  'domain_factor': functools.partial(factor, threshold=0.01),
}


@functools.cache
def two_steps(devices, name):
  """Returns the parameters after two steps on some devices."""
  method = MADE[name](normalised_net())
  mesh = sharding.make_mesh(devices)
  batches = batches_of(16, 8)
  state = jax.jit(method.init)(jax.random.key(0), batches)
  if name == 'compound':
    state = with_centroids(state)
  state = sharding.put_replicated(mesh, state)
  batches = sharding.put_batch(mesh, jax.tree.map(np.asarray, batches), leading=0)
  step = jax.jit(method.step)
  for _ in range(2):
    state, _ = step(state, batches)
  return jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['domain_factor', 'compound'])
def test_eight_devices_are_one(name):
  one, many = (two_steps(devices, name) for devices in (1, 8))
  close(many, one, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('compound', {'players': {}}, "needs a player 'discriminator'"),
    ('compound', {'align_on': ()}, 'compound needs alignment.align_on'),
    ('compound', {'streams': ('train',)}, "reads a stream 'target'"),
    ('domain_factor', {'players': {}}, "needs a player 'decoder'"),
  ],
)
def test_mistakes_are_reported_when_it_is_built(name, change, message):
  judge, fuse = (Player(net, adam(rate(0.01))) for net in (mlp(), fusion()))
  given = {
    'compound': {
      'players': {'discriminator': judge, 'fusion': fuse},
      'align_on': ('logits',),
      'streams': ('train', 'target'),
      'counts': np.ones(CLASSES),
    },
    'domain_factor': {
      'players': {},
      'streams': ('train', 'target'),
      'image_shape': (8, 8, 2),
    },
  }[name]
  with pytest.raises(UserError, match=message):
    METHODS[name](plain_net(), adam(rate(0.01)), **given | change)


def test_features_are_drawn_to_centroids_that_start_apart():
  """A network with the memory of OLTR's second stage, but no head that reads it."""
  net, batches = plain_net(), batches_of()
  parts = {
    'class_weights': lambda step: jnp.ones(CLASSES),
    'reduction': lambda w, y: jnp.full(len(y), 1 / len(y)),
  }

  def loss(outputs, batch):
    log_p = jax.nn.log_softmax(outputs['logits'])
    return -jnp.take_along_axis(log_p, batch['label'][:, None], 1)[:, 0]

  optimizer = sgd(rate(0.1), momentum=0.0)
  method = METHODS['centroid_loss'](net, optimizer, loss, **parts, weight=0.1)
  state = jax.jit(method.init)(jax.random.key(0), batches)
  c, label = state.params['centroids'], batches['train']['label']
  assert 0.5 < float(jnp.abs(c).mean()) < 1.1  # of N(0, 1): 0.8

  def objective(params, centroids):
    outputs = forward(net, params, {}, batches['train']['image'], train=True)[0]
    f = outputs['features']
    squares = ((f[:, None] - centroids[None]) ** 2).sum(-1)
    own = jax.nn.one_hot(label, CLASSES) > 0
    apart = jnp.where(own, 0, squares).sum() / squares.size
    drawn = jnp.where(own, squares, 0).sum() / (2 * len(f))
    centroid = drawn + 0.01 * jax.nn.relu(10 - apart)
    return loss(outputs, batches['train']).mean() + 0.1 * centroid, centroid

  (_, centroid), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
    state.params['net'], c
  )
  after, metrics = jax.jit(method.step)(state, batches)
  close(metrics['centroid_loss'][0], centroid)
  expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params['net'], grads)
  close(after.params['net'], expected)
  assert float(jnp.abs(after.params['centroids'] - c).max()) > 1e-4


# A run.


def test_a_run_leaves_a_memory_an_order_and_what_was_borrowed(tmp_path, one_device):
  """Runs all stages and checks what each passes on to the next."""
  made = digits_domains.get_config('ocda,epochs=1.0,target=blended+inverted')
  made.model.trunk, made.model.trunk_options = 'tiny_cnn', {'width': 4}
  made.evaluate_every_epochs, made.open_domains = 100.0, ()
  tiny.shrink_players(made)
  result = run.run(resolve(made), tmp_path)
  assert result['stage'] == 'scheduled' and not result['uses_target_labels']
  assert set(result['domains']) == {'source', 'blended', 'inverted'}
  with np.load(tmp_path / 'order.npz') as stored:
    order = dict(stored)
  assert order['domains'].tolist() == ['blended', 'inverted']
  assert np.bincount(order['domain']).tolist() == [600, 600]
  with np.load(tmp_path / 'stages/domain_factor/arrays.npz') as stored:
    np.testing.assert_array_equal(order['score'], stored['target/train/distance'])
  assert np.ptp(order['score']) > 0
  with np.load(tmp_path / 'borrowed.npz') as stored:
    share, domain = stored['borrowed'], stored['domain']
    assert set(stored['domains'].tolist()) == set(result['domains'])
  assert np.isfinite(share).all() and (share > 0).all() and set(domain) == {0, 1, 2}
  rows = read_rows(tmp_path / 'metrics.jsonl')
  assert {row['stage'] for row in rows if row['split'] == 'train'} == {
    'source',
    'adversarial',
    'domain_factor',
    'scheduled',
  }
  with np.load(tmp_path / 'features.npz') as stored:
    memory = stored['centroids']  # class means, not learned centroids
  experiment = build.build(resolve(made), devices=1)
  stage = experiment.stages['centroids']
  split = experiment.dataset.splits['train']
  opened = trained.open_run(tmp_path)
  source = {'net': opened.state.params['source_net']}
  state = opened.state.replace(
    params=source | {'centroids': jnp.zeros_like(opened.state.params['centroids'])},
    stats={'net': opened.state.stats['source_net']},
  )
  images = experiment.dataset.splits['train'].source.images[split.rows] / 255
  images = jnp.asarray((images - 0.306) / 0.318, jnp.float32)
  features = jax.jit(stage.method.predict)(state, images)['features']
  means = [np.mean(features[split.labels == c], axis=0) for c in range(10)]
  np.testing.assert_allclose(memory, means, rtol=2e-2, atol=1e-3)  # of float16
