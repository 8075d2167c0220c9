"""Few-shot parts: the generator follows its formula, episodes keep their promises."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_lt
from lt_jax import evaluate, files, run, sharding, writers
from lt_jax.config import resolve
from lt_jax.data.arrays import Arrays
from lt_jax.data.episodes import episode_stream, episodes
from lt_jax.data.streams import Split, evaluation_pass
from lt_jax.errors import UserError
from lt_jax.evals.collect import survey
from lt_jax.losses.classification import cross_entropy
from lt_jax.methods.few_shot import novel_classifiers, weight_generator
from lt_jax.methods.supervised import supervised
from lt_jax.models import Classifier
from lt_jax.models.few_shot import WeightGenerator
from lt_jax.models.heads import CosineBias, Linear, cosine_bias
from lt_jax.models.trunks import SmallCNN
from lt_jax.optim import sgd
from lt_jax.schedules import constant
from lt_jax.surgery import operate
from lt_jax.train import batches_at

pytestmark = pytest.mark.usefixtures('one_device')

CLASSES, WIDTH, IMAGE = 6, 8, (8, 8, 1)
BASE = np.array([True, True, False, True, True, False])


def loss(outputs, batch):
  return cross_entropy(outputs['logits'], batch['label'])


def network(head=None):
  return Classifier(SmallCNN(width=WIDTH // 2), head or cosine_bias(CLASSES))


def optimizer(rate=0.1):
  return sgd(
    lambda step: rate * constant(None)(step),
    weight_decay=(('.*', 5e-4),),
    learning_rate_scale=(('net/(?!head/).*', 0.0), ('.*', 1.0)),
  )


def method(**options):
  options = {'base': BASE, 'image_shape': IMAGE, 'dropout': 0.0, **options}
  return weight_generator(network(), optimizer(), loss, **options)


@functools.cache
def compiled(dropout=0.0):
  made = method(dropout=dropout)
  return made._replace(init=jax.jit(made.init), step=jax.jit(made.step))


def unit(v):
  return v / np.linalg.norm(v)


def proposal(z, params, kernel, attended):
  """One exemplar's proposal, entry by entry, in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  z = unit(np.asarray(z, np.float64))
  query = unit(z @ p['query']['kernel'] + p['query']['bias'])
  share, read = {}, np.zeros_like(z)
  for b in np.flatnonzero(attended):
    share[b] = np.exp(p['gamma'] * query @ unit(p['keys'][b]))
  for b, value in share.items():
    read += value / sum(share.values()) * unit(np.asarray(kernel[:, b], np.float64))
  return p['phi_average'] * z + p['phi_attention'] * read


def random_generator(rng, width=WIDTH, classes=CLASSES):
  """Parameters far from the initial ones, so that each of them matters."""

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
    'query': {'kernel': draw(width, width), 'bias': draw(width)},
    'keys': draw(classes, width),
    'gamma': jnp.float32(3.0),
    'phi_average': draw(width),
    'phi_attention': draw(width),
  }


def some_episode(rng, shots=(2, 3), most=4, queries=6):
  """Two classes with a few exemplars each, padded with values that must be ignored."""
  mask = np.arange(most)[None] < np.array(shots)[:, None]
  exemplars = rng.normal(size=(len(shots), most, WIDTH)).astype(np.float32)
  return {
    'pretended': np.array([3, 1], np.int32),
    'exemplars': exemplars,
    'exemplar_mask': mask,
    'queries': rng.normal(size=(queries, WIDTH)).astype(np.float32),
    'label': np.array([3, 1, 0, 4, 3, 0], np.int32),
  }


@pytest.fixture
def state(rng):
  """A state with a generator and a classifier of random numbers."""
  state = compiled().init(jax.random.key(0), {'train': some_episode(rng)})
  kernel = jnp.asarray(rng.normal(size=(WIDTH, CLASSES)), jnp.float32)
  head = {'kernel': kernel, 'scale': jnp.float32(7.0), 'bias': jnp.float32(0.25)}
  net = {**state.params['net'], 'head': head}
  return state.replace(params={'net': net, 'generator': random_generator(rng)})


def first_loss(state, episode, dropout=0.0):
  """The loss of one episode at the current parameters."""
  _, metrics = compiled(dropout).step(state, {'train': episode})
  return float(metrics['loss'][0])


# The head and the generator.


def test_cosine_bias_is_its_formula(rng):
  head, v = CosineBias(3), rng.normal(size=(4, 5))
  params = head.init(jax.random.key(0), jnp.ones((1, 5)))['params']
  assert (float(params['scale']), float(params['bias'])) == (10, 0)
  params = {**params, 'scale': jnp.float32(3.0), 'bias': jnp.float32(-0.5)}
  logits = head.apply({'params': params}, jnp.asarray(v, jnp.float32))
  for i in range(4):
    for c in range(3):
      w = np.asarray(params['kernel'][:, c], np.float64)
      assert logits[i, c] == pytest.approx(3 * (unit(v[i]) @ unit(w) - 0.5), abs=1e-5)


def test_a_generator_is_initialised_as_published():
  features, kernel = jnp.ones((1, 200)), jnp.ones((200, 300))
  init = jax.jit(WeightGenerator(30.0).init)
  made = init(jax.random.key(0), features, kernel, np.ones(300, bool))
  p = made['params']
  noise = np.asarray(p['query']['kernel']) - np.eye(200)
  assert noise.std() == pytest.approx(1e-3, rel=0.03)
  assert abs(noise.mean()) < 3e-5
  assert np.std(p['keys']) == pytest.approx(np.sqrt(2 / 200), rel=0.02)
  assert p['keys'].shape == (300, 200)
  assert float(p['gamma']) == 30
  assert not np.any(p['query']['bias'])
  assert np.all(p['phi_average'] == 1) and np.all(p['phi_attention'] == 1)


def test_a_proposal_is_its_formula(rng):
  params = random_generator(rng)
  features = rng.normal(size=(5, WIDTH)).astype(np.float32)
  kernel = rng.normal(size=(WIDTH, CLASSES)).astype(np.float32)
  made = WeightGenerator().apply({'params': params}, features, kernel, BASE)
  for z, ours in zip(features, made, strict=True):
    np.testing.assert_allclose(ours, proposal(z, params, kernel, BASE), atol=2e-5)


def test_without_attention_a_weight_starts_as_the_mean_direction(rng):
  features = rng.normal(size=(5, WIDTH)).astype(np.float32)
  kernel = rng.normal(size=(WIDTH, CLASSES)).astype(np.float32)
  generator = WeightGenerator()
  params = generator.init(jax.random.key(0), features, kernel, BASE)['params']
  params = {**params, 'phi_attention': jnp.zeros(WIDTH)}
  made = generator.apply({'params': params}, features, kernel, BASE)
  want = np.mean([unit(z) for z in features], axis=0)
  np.testing.assert_allclose(np.mean(made, axis=0), want, atol=1e-6)


# A step.


def reference_loss(state, episode):
  """Cross-entropy over base classes, with generated weights for pretended ones."""
  head, classes = state.params['net']['head'], list(episode['pretended'])
  kernel = np.asarray(head['kernel'], np.float64)
  attended = BASE & ~np.isin(np.arange(CLASSES), classes)
  weights = {b: kernel[:, b] for b in np.flatnonzero(attended)}
  for k, c in enumerate(classes):
    proposals = [
      proposal(z, state.params['generator'], kernel, attended)
      for z, real in zip(
        episode['exemplars'][k], episode['exemplar_mask'][k], strict=True
      )
      if real
    ]
    weights[c] = np.mean(proposals, axis=0)
  losses = []
  for v, y in zip(episode['queries'], episode['label'], strict=True):
    z = {
      c: float(head['scale']) * (unit(v) @ unit(w) + float(head['bias']))
      for c, w in weights.items()
    }
    losses.append(np.log(sum(np.exp(x) for x in z.values())) - z[y])
  return np.mean(losses)


def test_the_loss_of_an_episode_is_its_formula(rng, state):
  episode = some_episode(rng)
  assert first_loss(state, episode) == pytest.approx(
    reference_loss(state, episode), rel=1e-5
  )


def with_column(state, c, column):
  head = state.params['net']['head']
  kernel = head['kernel'].at[:, c].set(column)
  net = {**state.params['net'], 'head': {**head, 'kernel': kernel}}
  return state.replace(params={**state.params, 'net': net})


@pytest.mark.parametrize(('c', 'matters'), [(3, False), (1, False), (2, False), (0, 1)])
def test_own_weights_of_pretended_novel_classes_do_not_matter(rng, state, c, matters):
  """Nor do weights of classes that are not base; those of base classes do."""
  episode = some_episode(rng)
  column = jnp.asarray(rng.normal(size=WIDTH), jnp.float32)
  losses = [first_loss(s, episode) for s in (state, with_column(state, c, column))]
  assert (losses[0] != losses[1]) == bool(matters)


@pytest.mark.parametrize('dropout', [0.0, 0.5])
def test_padding_does_not_matter(rng, state, dropout):
  episode = some_episode(rng)
  mask = episode['exemplar_mask'][..., None]
  other = np.where(mask, episode['exemplars'], 100.0).astype(np.float32)
  losses = [
    first_loss(state, e, dropout) for e in (episode, {**episode, 'exemplars': other})
  ]
  assert losses[0] == losses[1]


def test_the_trunk_is_held_and_the_rest_is_trained(rng, state):
  """Base weights, scale and generator train; weight decay does not touch the trunk."""
  new, metrics = compiled().step(state, {'train': some_episode(rng)})
  same = jax.tree.map(np.array_equal, state.params, new.params)
  assert all(jax.tree.leaves(same['net']['trunk']))
  assert not any(jax.tree.leaves(same['generator']))
  assert not same['net']['head']['kernel'] and not same['net']['head']['scale']
  assert int(new.step) == 1
  assert metrics['class_loss'][1].tolist() == [2, 1, 0, 2, 1, 0]
  assert set(metrics) == {
    'loss',
    'accuracy',
    'class_loss',
    'grad_norm',
    'learning_rate',
  }


def test_dropout_differs_from_step_to_step(rng, state):
  episode = some_episode(rng)
  losses = [
    first_loss(state.replace(step=jnp.int32(step)), episode, 0.5) for step in (0, 0, 1)
  ]
  assert losses[0] == losses[1] != losses[2]


# Episodes.

COUNTS = (30, 2, 9, 21, 12, 3)
LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(CLASSES), COUNTS))
SIZES = {'novel': 2, 'queries_novel': 8, 'queries_base': 6, 'shots': (1, 2, 5)}


def test_an_episode_keeps_its_promises():
  tasks = episodes(LABELS, BASE, **SIZES)
  seen_shots, seen_classes = set(), set()
  for seed in range(3):
    for step in range(40):
      drawn = tasks.draw(seed, step)
      classes, mask = drawn['pretended'], drawn['exemplar_mask']
      exemplars, queries, label = (drawn[n] for n in ('exemplars', 'queries', 'label'))
      assert len(set(classes)) == 2 and BASE[classes].all()
      assert (LABELS[exemplars] == classes[:, None]).all()
      assert (exemplars[~mask] == np.repeat(exemplars[:, :1], 5, 1)[~mask]).all()
      used = exemplars[mask]
      assert len(set(used)) == len(used)
      assert not set(used) & set(queries)
      assert (LABELS[queries] == label).all()
      pretends = np.isin(label, classes)
      assert pretends.sum() == 8 and (~pretends).sum() == 6 and BASE[label].all()
      assert [(label == c).sum() for c in classes] == [4, 4]
      shots = [mask[k].sum() for k in range(2) if COUNTS[classes[k]] > 5]
      assert len(set(shots)) <= 1 and set(shots) <= {1, 2, 5}
      assert all(mask[k].sum() == 1 for k in range(2) if classes[k] == 1)
      for c in set(label) - {1}:  # a class of two images repeats its query
        of_class = queries[label == c]
        assert len(set(of_class)) == len(of_class)
      seen_shots |= set(shots)
      seen_classes |= set(classes)
  assert seen_shots == {1, 2, 5}
  assert seen_classes == {0, 1, 3, 4}


def test_an_episode_is_a_function_of_seed_and_step():
  tasks, again = (episodes(LABELS, BASE, **SIZES) for _ in range(2))
  first = tasks.draw(0, 5)
  tasks.draw(0, 6)
  jax.tree.map(np.testing.assert_array_equal, first, tasks.draw(0, 5))
  jax.tree.map(np.testing.assert_array_equal, first, again.draw(0, 5))
  for other in (tasks.draw(1, 5), tasks.draw(0, 6)):
    assert not np.array_equal(first['queries'], other['queries'])
  kinds = {name: x.dtype.name for name, x in first.items()}
  assert kinds.pop('exemplar_mask') == 'bool'
  assert set(kinds.values()) == {'int32'}
  assert (tasks.images, tasks.novel, tasks.queries) == (len(LABELS), 2, 14)


def test_a_batch_has_features_instead_of_positions(rng):
  features = rng.normal(size=(len(LABELS), WIDTH)).astype(np.float32)
  tasks = episodes(LABELS, BASE, **SIZES)
  stream = episode_stream(tasks, features, seed=2)
  drawn = tasks.draw(2, 3)
  batch = stream.prepare(stream.arrays, stream.payload(3), jax.random.key(0))
  for name in ('exemplars', 'queries'):
    np.testing.assert_array_equal(batch[name], features[drawn[name]])
  np.testing.assert_array_equal(batch['label'], drawn['label'])


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'base': np.arange(6) == 0}, 'need 2 base classes, here are 1'),
    ({'base': np.ones(6, bool)}, 'no novel class'),
    ({'novel': 4}, 'less than the 4 base classes, got 4'),
    ({'novel': 0}, 'at least 1'),
    ({'labels': np.repeat(np.arange(6), (9, 1, 9, 9, 9, 9))}, 'base class 1 has 1'),
    ({'queries_novel': 0}, '0 novel and 6 base queries'),
    ({'shots': (1, 0)}, 'shots must be positive'),
    ({'shots': ()}, 'shots must be positive'),
  ],
)
def test_numbers_that_make_no_episode_are_reported(changed, message):
  with pytest.raises(UserError, match=message):
    episodes(**{'labels': LABELS, 'base': BASE, **SIZES, **changed})


def test_features_of_other_images_are_reported():
  tasks = episodes(LABELS, BASE, **SIZES)
  with pytest.raises(UserError, match='do not fit 77 images'):
    episode_stream(tasks, jax.ShapeDtypeStruct((76, WIDTH), np.float32), seed=0)


# Training on episodes.


@functools.cache
def train(steps, devices):
  """Trains on Gaussian classes; returns the losses and how often a step was traced."""
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(CLASSES, WIDTH))
  features = centres[LABELS] + 0.7 * rng.normal(size=(len(LABELS), WIDTH))
  mesh = sharding.make_mesh(devices)
  tasks = episodes(LABELS, BASE, **SIZES)
  stream = episode_stream(
    tasks, sharding.put_replicated(mesh, features.astype(np.float32)), seed=0
  )
  made, traces, losses = method(), [], []  # a new one, because traces are counted

  @jax.jit
  def one(state, arrays, payload):
    traces.append(None)
    step = state.step
    batches = batches_at(
      {'train': stream}, {'train': arrays}, {'train': payload}, state.key, step
    )
    return made.step(state, batches)

  def payload(step):
    return sharding.put_batch(mesh, stream.payload(step))

  first = stream.prepare(stream.arrays, payload(0), None)
  state = jax.jit(made.init)(jax.random.key(0), {'train': first})
  state = sharding.put_replicated(mesh, state)
  for step in range(steps):
    state, metrics = one(state, stream.arrays, payload(step))
    losses.append(float(metrics['loss'][0]))
  return np.array(losses), len(traces)


@pytest.mark.slow
def test_fifty_episodes_lower_the_loss_in_one_program():
  losses, traces = train(50, devices=1)
  assert traces == 1
  assert losses[-10:].mean() < 0.6 * losses[:10].mean()


@pytest.mark.slow
def test_two_devices_compute_what_one_does():
  """A sharded scatter of generated weights, and a mean over sharded queries."""
  alone, together = train(50, devices=1)[0][:5], train(5, devices=2)[0]
  np.testing.assert_allclose(alone, together, rtol=1e-4)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'base': np.ones(5, bool)}, "needs a 'cosine_bias' head of 5 classes"),
    ({'dropout': 1.0}, r'dropout must be in \[0, 1\), got 1.0'),
  ],
)
def test_options_that_do_not_fit_are_reported(rng, options, message):
  with pytest.raises(UserError, match=message):
    method(**options).init(jax.random.key(0), {'train': some_episode(rng)})


def test_features_of_another_network_are_reported(rng):
  episode = {**some_episode(rng), 'queries': np.zeros((6, 5), np.float32)}
  with pytest.raises(UserError, match='size 5, but those of the network have size 8'):
    method().init(jax.random.key(0), {'train': episode})


def test_a_different_head_is_reported(rng):
  made = weight_generator(
    network(Linear(CLASSES)), optimizer(), loss, base=BASE, image_shape=IMAGE
  )
  with pytest.raises(UserError, match="needs a 'cosine_bias' head of 6 classes"):
    made.init(jax.random.key(0), {'train': some_episode(rng)})


# The novel classes.


def plain(key, batch):
  return {**batch, 'image': batch['image'].astype(jnp.float32) / 255}


class Novel:
  """A stage without steps after one with a generator, with a few images per class."""

  def __init__(self, rng, state, counts=(3, 2, 4, 1, 1, 2)):
    self.labels = np.repeat(np.arange(CLASSES), counts).astype(np.int32)
    images = rng.integers(0, 256, (len(self.labels), *IMAGE)).astype(np.uint8)
    rows = np.arange(len(self.labels))
    names = tuple(str(c) for c in range(CLASSES))
    split = Split(Arrays(images, self.labels, names), rows, self.labels, {})
    self.images = plain(None, {'image': jnp.asarray(images)})['image']
    self.method = supervised(
      network(), optimizer(), loss, class_weights=None, reduction=None
    )
    batches = {'train': {'image': self.images[:1]}}
    self.state = jax.jit(self.method.init)(jax.random.key(1), batches)
    self.state = self.state.replace(params={'net': state.params['net']})
    self.earlier = {'generator': state}
    passes = {'train': evaluation_pass(split, batch=4, transform=plain)}
    self.survey = survey(self.method.predict, passes, sharding.make_mesh(2))

  def surgery(self, stage='generator', base=BASE):
    return novel_classifiers(stage=stage, survey=self.survey, base=base)


def test_novel_classes_get_the_mean_proposal_of_all_their_images(rng, state):
  novel = Novel(rng, state)
  head = operate(novel.state, novel.earlier, [novel.surgery()]).params['net']['head']
  before = np.asarray(novel.state.params['net']['head']['kernel'])
  predict = jax.jit(novel.method.predict)
  features = np.asarray(predict(novel.state, novel.images)['features'])
  for c in range(CLASSES):
    if BASE[c]:
      np.testing.assert_array_equal(head['kernel'][:, c], before[:, c])
    else:
      want = np.mean(
        [
          proposal(z, state.params['generator'], before, BASE)
          for z in features[novel.labels == c]
        ],
        axis=0,
      )
      np.testing.assert_allclose(head['kernel'][:, c], want, atol=2e-5)
  np.testing.assert_array_equal(head['scale'], state.params['net']['head']['scale'])


def test_a_rehearsal_looks_at_no_image(rng, state):
  novel = Novel(rng, state)
  shapes = jax.eval_shape(lambda: (novel.state, novel.earlier))
  rehearsed = novel.surgery()(*shapes)
  assert rehearsed.params['net']['head']['kernel'].shape == (WIDTH, CLASSES)


def test_mistakes_of_the_novel_stage_are_reported(rng, state):
  novel = Novel(rng, state, counts=(3, 2, 4, 1, 1, 0))
  with pytest.raises(UserError, match='class 5 has no image in train'):
    novel.surgery()(novel.state, novel.earlier)
  with pytest.raises(UserError, match="did you mean 'generator'"):
    novel.surgery(stage='generater')(novel.state, novel.earlier)
  with pytest.raises(UserError, match="'base' has no weight generator"):
    novel.surgery(stage='base')(novel.state, {'base': novel.state})
  with pytest.raises(UserError, match='every class is base'):
    novel.surgery(base=np.ones(CLASSES, bool))


@pytest.fixture(scope='module')
def digits_run(tmp_path_factory):
  """The folder of a short run of all three stages on digits."""
  config = digits_lt.get_config('fslwf,epochs=4')
  config.stages.generator.streams.train.per_epoch = 4
  config.log_every_steps = 4
  config.model.trunk, config.model.trunk_options = 'tiny_cnn', {'width': 4}
  workdir = tmp_path_factory.mktemp('fslwf')
  run.run(resolve(config), workdir)
  return workdir


def test_three_stages_on_digits(digits_run):
  result = json.loads((digits_run / 'result.json').read_text())
  assert result['stage'] == 'novel' and result['step'] == 0
  with np.load(digits_run / 'stages' / 'base' / 'arrays.npz') as left:
    assert left['features'].shape == (225, 8)  # training images, base or not
  rows = writers.read_rows(digits_run / 'metrics.jsonl')
  steps = {row['stage']: row['step'] for row in rows}
  assert steps['generator'] == 20
  # Weights of novel classes are generated, those of base classes come from the
  # generator stage.
  again = evaluate.evaluate(digits_run)
  assert again['state_sha256'] == result['state_sha256']
  before = evaluate.evaluate(digits_run, stage_name='generator')
  assert before['state_sha256'] != again['state_sha256']
  by_class = [r['test']['class_accuracy'] for r in (before, again)]
  assert not np.array_equal(*by_class)


def test_missing_outputs_of_a_stage_are_named(digits_run):
  config = files.read_json(digits_run / 'config.json')
  stages = digits_run / 'stages'
  shutil.rmtree(stages / 'generator')
  path = stages / 'base' / 'arrays.npz'
  with np.load(path) as whole:
    origin = whole['state_sha256']
  np.savez(path, features=np.zeros((3, 8), np.float32), state_sha256=origin)
  with pytest.raises(UserError, match=r'features is \(3, 8\), but it should be \(225'):
    run.run(config, digits_run)
