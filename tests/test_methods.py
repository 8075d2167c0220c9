"""One table of contract checks for every recipe, on eight images.

The exception are few-shot tasks, which need more: see tests/test_few_shot.py.
"""

import functools
import hashlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lt_jax import build, checkpoint, sharding, train
from lt_jax.class_weights import make_class_weights
from lt_jax.config import config_digest, stage_config
from lt_jax.errors import UserError, construct
from lt_jax.losses import REDUCTIONS, make_loss
from lt_jax.method import forward
from lt_jax.methods import METHODS
from lt_jax.models import make_classifier
from lt_jax.optim import make_optimizer
from lt_jax.recipes import RECIPES
from lt_jax.schedules import make_schedule
from tests import tiny

STEPS = 100


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  return tiny.write_npz(tmp_path_factory.mktemp('tiny') / 'tiny.npz')


@pytest.fixture(scope='module')
def extreme(tmp_path_factory):
  counts = (500, 1, 1, 1)
  return tiny.write_npz(tmp_path_factory.mktemp('extreme') / 'tiny.npz', counts)


ELSEWHERE = ('recipe', 'stages', 'stage_order', 'sampler', 'surgeries')
"""Config keys on which the compiled step does not depend."""

PROGRAMS = {}
"""Compiled functions by dependencies: recipes that differ in samplers share one."""


class Runner:
  """A recipe's last stage with steps, on some devices, with its compiled step."""

  def __init__(self, npz, recipe, devices=1, **overrides):
    config = tiny.config(npz, f'{recipe},epochs={STEPS}.0', **overrides)
    self.experiment = build.build(config, devices=devices)
    self.stage = [s for s in self.experiment.stages.values() if s.plan.steps][-1]
    self.mesh = self.experiment.mesh
    self.arrays = {name: s.arrays for name, s in self.stage.streams.items()}
    merged = stage_config(config, self.stage.name)
    self.split = self.stage.images[self.stage.trained_on['train']]
    key = config_digest({k: v for k, v in merged.items() if k not in ELSEWHERE})
    if (key, devices) not in PROGRAMS:
      PROGRAMS[key, devices] = self._program()
    self.init, self.update, self.traces, self.zeros = PROGRAMS[key, devices]

  def _program(self):
    streams, method, traces = self.stage.streams, self.stage.method, []
    counted = method._replace(step=self._counted(method.step, traces))
    init = functools.partial(
      train.initial_state, method, streams, jax.random.key(0), self.mesh
    )
    first = train.state_shapes(method, streams)
    zeros = train.empty_totals(method, streams, first, self.mesh)
    return init, train.make_update(counted, streams, self.mesh, 1), traces, zeros

  def _counted(self, step, traces):
    """Counts how often a step is traced."""

    def counted(state, batches):
      traces.append(1)
      return step(state, batches)

    return counted

  def run(self, state, steps):
    """Runs from the given state; returns the last state and all metrics."""
    totals, bad = self.zeros
    for step in range(int(state.step), int(state.step) + steps):
      rows = train.payloads_at(self.stage.streams, step)
      rows = jax.tree.map(lambda x: x[None], rows)
      payload = sharding.put_batch(self.mesh, rows, leading=1)
      state, totals, bad = self.update(state, totals, bad, self.arrays, payload)
    return state, jax.device_get(totals), int(bad)


# A step with one domain and one player has no overhead.


def described(npz, recipe):
  """Returns (last stage of a recipe, its config, shapes of a State and of batches)."""
  config = tiny.config(npz, f'{recipe},epochs={STEPS}.0')
  stage = build.build(config, devices=1).last
  image = jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.float32)
  batch = {'image': image, 'label': jax.ShapeDtypeStruct((8,), jnp.int32)}
  batches = {name: batch for name in stage.streams}
  state = train.state_shapes(stage.method, stage.streams)
  return stage, stage_config(config, stage.name), state, batches


def tiny_net(config):
  model = config['model']
  return make_classifier(
    model['trunk'], model['head'], num_classes=4, trunk_options=model['trunk_options']
  )


@pytest.mark.parametrize('recipe', ['ce', 'meta_ce'])
def test_a_step_that_is_built_is_the_method_called_by_hand(npz, recipe):
  """Config options on domains, players and alignments leave no trace in the step."""
  stage, config, state, batches = described(npz, recipe)
  counts = stage.dataset.counts
  weights = dict(config['class_weights'], start_step=0)
  del weights['start_epoch']
  options = dict(config['method'])
  rate = make_schedule(**config['schedule'], length=8, batch=8)
  method = construct(
    METHODS,
    'method',
    options.pop('name'),
    tiny_net(config),
    make_optimizer(learning_rate=rate, **config['optimizer']),
    make_loss('cross_entropy', counts),
    options=options,
    counts=counts,
    class_weights=make_class_weights(**weights, counts=counts),
    reduction=REDUCTIONS[config['reduction']],
    streams=tuple(stage.streams),
  )
  ours, by_hand = (
    jax.jit(step).lower(state, batches).as_text()
    for step in (stage.method.step, method.step)
  )
  assert ours == by_hand


def graph(program):
  """Returns a digest of an optimised program that does not depend on names.

  That of an instruction is of what it does and of the digests of what it reads; that of
  the whole is of the result. Nor does it depend on the order in which they stand.
  """
  digests, owner = {}, ''

  def told(line):
    line = re.sub(r',? metadata=\{[^}]*\}', '', line)
    line = re.sub(r'%[\w.-]+', lambda name: digests.get(name[0], name[0]), line)
    return hashlib.sha256(line.encode()).hexdigest()

  for line in program.splitlines():
    if begun := re.match(r'(?:ENTRY )?(%[\w.-]+) \(.*\{$', line):
      owner = begun[1]
    elif made := re.match(r'  (ROOT )?(%[\w.-]+) = (.*)', line):
      digests[made[2]] = told(made[3])
      if made[1]:
        digests[owner] = digests[made[2]]
  assert len(digests) > 500
  return digests[owner]


def test_a_step_compiles_to_the_program_of_the_same_written_plainly(npz):
  """Domains, players, losses and the like by name leave no instruction behind.

  Only that class weights can begin at some step costs a comparison of the clock.
  """
  stage, config, state, batches = described(npz, 'ce')
  net, (_, decay) = tiny_net(config), config['optimizer']['weight_decay'][0]
  outside = {'mode': 'fill', 'fill_value': 0, 'wrap_negative_indices': False}

  def plain(state, batches):
    """Cross-entropy, momentum and decay, with the metrics of a log row."""
    image, label = batches['train']['image'], batches['train']['label']
    seen, one = label >= 0, jnp.float32(1)
    table = jnp.where(state.step >= 0, jnp.ones(4), 1.0)
    coefficients = table.at[label].get(**outside) / 8 * (8 / jnp.maximum(seen.sum(), 1))

    def objective(params):
      variables = {'params': params, 'batch_stats': state.stats['net']}
      outputs, new = net.apply(variables, image, train=True, mutable=['batch_stats'])
      targets = jax.nn.one_hot(jnp.maximum(label, 0), 4)
      losses = optax.softmax_cross_entropy(outputs['logits'], targets)
      losses = jnp.where(seen, losses, 0)
      right = outputs['logits'].argmax(-1) == label
      return jnp.vdot(coefficients, losses), (new['batch_stats'], losses, right)

    def by_class(values):
      sums = jnp.zeros(4).at[label]
      return sums.add(values, mode='drop', wrap_negative_indices=False)

    (loss, (stats, losses, right)), grads = jax.value_and_grad(objective, has_aux=True)(
      state.params['net']
    )
    opt = state.opt['net']
    trace = jax.tree.map(
      lambda b, g, p: (g + decay * p) + 0.9 * b,
      opt.inner_state.trace,
      grads,
      state.params['net'],
    )
    params = jax.tree.map(lambda p, b: p - 0.05 * b, state.params['net'], trace)
    opt = opt._replace(inner_state=opt.inner_state._replace(trace=trace))
    metrics = {
      'loss': (loss, one),
      'accuracy': (right.sum(dtype=jnp.float32), seen.sum(dtype=jnp.float32)),
      'class_loss': (by_class(losses), by_class(1.0)),
      'grad_norm': (optax.tree.norm(grads), one),
      'learning_rate': (jnp.float32(0.05), one),
    }
    after = {'params': {'net': params}, 'stats': {'net': stats}, 'opt': {'net': opt}}
    return state.replace(step=state.step + 1, **after), metrics

  ours, theirs = (
    jax.jit(step).lower(state, batches).compile().as_text()
    for step in (stage.method.step, plain)
  )
  assert graph(ours) == graph(theirs)
  assert graph(ours) != graph(ours.replace('constant(0.9)', 'constant(0.8)'))


REPEATS = (
  'sigmoid',
  'sigmoid_focal',
  'balanced_softmax',
  'range',
  'lade',
  'ce_plus_meta',
  'logit_adjust_posthoc',
  'tau_norm',
  'tail_mmd',
  'tail_dann',
  'tail_self_supervised',
  'focal',
  'cb_ce',
  'cb_sigmoid',
  'ce_drw',
  'ce_drs',
  'resample_sqrt',
  'ldam',
  'margin_drw',
  'logit_adjust',
  'vs',
  'cdt',
  'meta_focal',
  'meta_ldam',
  'meta_ce_control',
  'ce_aware',
  'focal_aware',
  'openmax',
  'crt_las',
  'ncm',
  'linear_svm',
  'nearest_neighbour',
)
"""Recipes with another one's method and head; their losses have their own tests."""


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(recipe, marks=pytest.mark.slow if recipe in REPEATS else ())
    for recipe, made in RECIPES.items()
    if recipe != 'fslwf'
    and not {'target', 'init', 'heads', 'class_vectors'} & {*made.needs}
  ],
)
def runner(request, npz):
  return Runner(npz, request.param)


@pytest.fixture(scope='module')
def trained(runner):
  """Returns (types of the first state, last state, metrics, first non-finite step)."""
  state = runner.init()
  first = checkpoint.abstract(state, sharding.replicated(runner.mesh))
  return first, *runner.run(state, STEPS)


def test_a_state_keeps_its_structure_shapes_and_types(trained):
  first, last, _, _ = trained
  chex.assert_trees_all_equal_shapes_and_dtypes(first, last)
  assert int(last.step) == STEPS


def test_it_is_traced_once(runner, trained):
  assert len(runner.traces) == 1


def test_it_is_finite_although_a_class_has_most_of_the_images(trained):
  _, last, metrics, bad = trained
  assert bad == -1
  assert checkpoint.all_finite(last)
  assert {'loss', 'accuracy', 'grad_norm', 'learning_rate'} <= metrics.keys()


def test_it_overfits_eight_images(runner, trained):
  _, last, _, _ = trained
  split = runner.split
  images = split.source.images[split.rows].astype(np.float32) / 127.5 - 1
  outputs = jax.jit(runner.stage.method.predict)(last, images)
  correct = outputs['logits'].argmax(-1) == split.labels
  assert (~correct).sum() <= 1  # of eight or sixteen
  assert outputs['features'].shape[0] == len(split.labels)


def test_saving_and_resuming_equals_the_unbroken_run(runner, trained, tmp_path):
  state, _, _ = runner.run(runner.init(), STEPS // 3)
  ladder = checkpoint.Checkpoints(tmp_path)
  ladder.save(STEPS // 3, state)
  ladder.wait()
  target = checkpoint.abstract(state, sharding.replicated(runner.mesh))
  restored = ladder.restore(target).state
  ladder.close()
  state, _, _ = runner.run(restored, STEPS - STEPS // 3)
  assert checkpoint.digest(state) == checkpoint.digest(trained[1])


def assert_devices_agree(npz, recipe, one, devices):
  """Compares after three steps, because rounding errors grow with steps."""
  many = Runner(npz, recipe, devices=devices)
  first = sharding.put_replicated(many.mesh, jax.device_get(one.init()))
  chex.assert_trees_all_close(
    jax.device_get(one.run(one.init(), 3)[0].params),
    jax.device_get(many.run(first, 3)[0].params),
    rtol=2e-3,
    atol=2e-5,
  )


ONE_A_FAMILY = ('ldam_drw', 'lifted', 'oltr', 'mwn', 'meta_ce')
SHARDED = (
  'oltr',
  'meta_ce',
)  # these cover the others, a memory and a second batch


@pytest.mark.parametrize(
  'recipe',
  [
    pytest.param(name, marks=() if name in SHARDED else pytest.mark.slow)
    for name in ONE_A_FAMILY
  ],
)
def test_eight_devices_are_one(npz, recipe):
  assert_devices_agree(npz, recipe, Runner(npz, recipe), devices=8)


@pytest.mark.slow
def test_eight_devices_are_one_by_any_recipe(npz, runner, request):
  recipe = request.node.callspec.params['runner']
  assert_devices_agree(npz, recipe, runner, devices=8)


@pytest.mark.slow
def test_two_devices_are_one(npz):
  assert_devices_agree(npz, 'ldam_drw', Runner(npz, 'ldam_drw'), devices=2)


def test_accumulation_equals_the_whole_batch_without_batch_statistics(npz):
  """With frozen statistics the gradient is a sum over examples."""
  models = [
    Runner(
      npz,
      'ce_drw',
      model={**tiny.config(npz, 'ce_drw')['model'], 'batch_norm': 'frozen'},
      method={'name': 'supervised', 'accumulate': k},
    )
    for k in (1, 4)
  ]
  whole, parts = [m.run(m.init(), 3) for m in models]
  chex.assert_trees_all_close(
    jax.device_get(whole[0].params),
    jax.device_get(parts[0].params),
    rtol=1e-4,
    atol=1e-6,
  )
  for name, (total, count) in whole[1].items():
    np.testing.assert_allclose(parts[1][name][0], total, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(parts[1][name][1], count, rtol=1e-6, err_msg=name)


def test_accumulation_counts_updates_and_moves_statistics_by_part(npz):
  model = tiny.config(npz, 'ce')['model']
  net = make_classifier(
    model['trunk'],
    model['head'],
    num_classes=4,
    trunk_options=model['trunk_options'],
  )
  runner = Runner(npz, 'ce', method={'name': 'supervised', 'accumulate': 2})
  streams, first = runner.stage.streams, runner.init()
  payloads = {name: stream.payload(0) for name, stream in streams.items()}
  batches = train.batches_at(streams, runner.arrays, payloads, first.key, 0)
  last, _, _ = runner.run(runner.init(), 1)  # donates its state
  assert int(last.step) == 1
  expected, moved = (
    first.stats['net'],
    jax.jit(functools.partial(forward, net, train=True)),
  )
  for part in range(2):  # every second image, one part after the other
    images = batches['train']['image'][part::2]
    _, expected = moved(first.params['net'], expected, images)
  chex.assert_trees_all_close(
    jax.device_get(last.stats['net']), jax.device_get(expected), rtol=1e-4
  )


@pytest.mark.parametrize(  # every method, and everything that uses counts
  'recipe',
  [
    pytest.param('cb_focal', marks=pytest.mark.slow),
    pytest.param('ldam_drw', marks=pytest.mark.slow),
    pytest.param('balanced_softmax', marks=pytest.mark.slow),
    pytest.param('l2rw', marks=pytest.mark.slow),
    pytest.param('mwn', marks=pytest.mark.slow),
    'meta_ldam',
  ],
)
def test_five_hundred_images_to_one_are_finite(extreme, recipe):
  runner = Runner(extreme, recipe)
  _, _, bad = runner.run(runner.init(), 3)
  assert bad == -1


def test_a_batch_that_does_not_divide_is_rejected(npz):
  with pytest.raises(UserError, match='batch 8 does not divide into 3'):
    Runner(npz, 'ce', method={'name': 'supervised', 'accumulate': 3})


def test_a_penalty_refuses_accumulation():
  from lt_jax.methods.supervised import supervised

  with pytest.raises(UserError, match='penalty needs the whole batch'):
    supervised(
      None,
      None,
      None,
      class_weights=None,
      reduction=None,
      penalty=lambda outputs, batch: 0.0,
      accumulate=2,
    )


def test_a_penalty_is_added_unweighted(npz):
  """Its gradient is added whatever the class weights are."""
  from lt_jax.methods.supervised import supervised

  net = make_classifier(
    'digits_cnn',
    'linear',
    4,
    dtype='float32',
    batch_norm={'groups': 1, 'frozen': True},
    trunk_options={'width': 4},
    head_options={},
  )
  method = supervised(
    net,
    make_optimizer('sgd', lambda step: jnp.float32(0.5), momentum=0.0),
    lambda outputs, batch: jnp.zeros(8),
    class_weights=lambda step: jnp.full(4, 7.0),
    reduction=REDUCTIONS['mean'],
    penalty=lambda outputs, batch: 3.0 * outputs['logits'].mean(),
  )
  batch = {
    'image': np.ones((8, 8, 8, 1), np.float32),
    'label': np.arange(8, dtype=np.int32) % 4,
  }
  first = jax.jit(method.init)(jax.random.key(0), {'train': batch})
  last, metrics = jax.jit(method.step)(first, {'train': batch})
  bias = [np.asarray(s.params['net']['head']['bias']) for s in (first, last)]
  np.testing.assert_allclose(bias[1] - bias[0], np.full(4, -0.5 * 3 / 4), rtol=1e-5)
  total, count = metrics['loss']
  logits = np.asarray(jax.jit(method.predict)(first, batch['image'])['logits'])
  np.testing.assert_allclose(total / count, 3 * logits.mean(), rtol=1e-5, atol=1e-6)


def test_ema_is_the_average_and_is_what_predicts(npz):
  runner = Runner(npz, 'ce', wrappers={'ema': {'decay': 0.5}})
  images = np.ones((8, 8, 8, 1), np.float32)
  plain = jax.jit(Runner(npz, 'ce').stage.method.predict)
  averaged = jax.jit(runner.stage.method.predict)
  state = runner.init()
  np.testing.assert_array_equal(  # before step 1, predictions use the parameters
    averaged(state, images)['logits'], plain(state, images)['logits']
  )
  visited = []
  for _ in range(4):
    state, _, _ = runner.run(state, 1)
    visited.append(jax.device_get({'params': state.params, 'stats': state.stats}))
  weights = 0.5 ** np.arange(3, -1, -1)
  average = jax.tree.map(
    lambda *x: np.average(x, axis=0, weights=weights).astype(np.float32), *visited
  )
  np.testing.assert_allclose(
    averaged(state, images)['logits'],
    plain(state.replace(**average), images)['logits'],
    rtol=1e-4,
    atol=1e-5,
  )


def test_adjusted_logits_are_shifted_by_the_log_prior(npz):
  runner = Runner(npz, 'ce', wrappers={'adjust_logits': {'tau': 0.5}})
  state = runner.init()
  images = np.ones((8, 8, 8, 1), np.float32)
  adjusted, plain = (
    np.asarray(jax.jit(one.stage.method.predict)(state, images)['logits'])
    for one in (runner, Runner(npz, 'ce'))
  )
  expected = -0.5 * np.log(np.array(tiny.COUNTS) / 8)
  shift = np.tile(expected, (8, 1))
  np.testing.assert_allclose(adjusted - plain, shift, rtol=1e-4)
