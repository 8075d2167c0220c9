"""The examples of docs/extending.md do what they say."""

import doctest
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_domains
from lt_jax import build, losses, methods, train
from lt_jax.config import resolve
from lt_jax.losses import alignment
from tests import tiny
from tests.test_methods import STEPS, Runner

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'extending.md'


@pytest.fixture(scope='module')
def examples():
  """Name -> what the page's Python blocks define."""
  names = {}
  for block in PAGE.read_text().split('```python\n')[1:]:
    code = block.partition('```')[0]
    if 'def ' in code:
      exec(compile(code, str(PAGE), 'exec'), names)
  return names


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  return tiny.write_npz(tmp_path_factory.mktemp('docs') / 'tiny.npz')


def test_the_loss_is_built_by_its_name(examples, monkeypatch):
  monkeypatch.setitem(losses.LOSSES, 'poly_loss', examples['LOSSES']['poly_loss'])
  logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
  batch = {'label': jnp.array([0, 2])}
  plain, poly, none = (
    losses.make_loss(name, counts=np.ones(3), **options)({'logits': logits}, batch)
    for name, options in (
      ('cross_entropy', {}),
      ('poly_loss', {'epsilon': 2.0}),
      ('poly_loss', {'epsilon': 0.0}),
    )
  )
  p = np.exp(-np.asarray(plain, np.float64))
  np.testing.assert_allclose(poly, -np.log(p) + 2 * (1 - p), rtol=1e-6)
  np.testing.assert_allclose(none, plain, rtol=1e-6)


def test_the_docstrings_are_true(examples):
  finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
  for name in ('poly_loss', 'mean_distance'):
    (test,) = finder.find(examples[name], name, module=False, globs=examples)
    assert test.examples and not runner.run(test).failed


def test_the_data_set_builds(examples, no_data):
  experiment = build.build(resolve(examples['get_config']('ldam_drw')))
  assert experiment.dataset.counts[0] == 1000 and experiment.dataset.counts[-1] == 10


def test_the_surgery_measures(examples, npz):
  experiment = build.build(tiny.config(npz, 'ce'))
  method = experiment.stages['train'].method
  surgery = examples['mean_feature'](survey=experiment.last.survey)
  fresh = train.initial_state(
    method, experiment.stages['train'].streams, jax.random.key(0), experiment.mesh
  ).replace(memory={'mean_feature': jnp.zeros(8)})
  found = surgery(fresh, {}).memory['mean_feature']
  split = experiment.dataset.splits['train']
  images = split.source.images[split.rows].astype(np.float32) / 127.5 - 1
  expected = method.predict(fresh, images)['features'].mean(0)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_method_meets_the_contract(examples, npz, monkeypatch):
  monkeypatch.setitem(methods.METHODS, 'sharpness_aware', examples['sharpness_aware'])
  option = {'name': 'sharpness_aware', 'rho': 0.05}
  runner = Runner(npz, 'ce', method=option)
  first = jax.tree.map(jnp.shape, runner.init())
  last, metrics, bad = runner.run(runner.init(), STEPS)
  assert bad == -1 and len(runner.traces) == 1
  assert {'loss', 'accuracy', 'grad_norm', 'learning_rate'} <= metrics.keys()
  assert first == jax.tree.map(jnp.shape, last)
  split = runner.experiment.dataset.splits['train']
  images = split.source.images[split.rows].astype(np.float32) / 127.5 - 1
  logits = runner.stage.method.predict(last, images)['logits']
  np.testing.assert_array_equal(logits.argmax(-1), split.labels)


def two_domains(monkeypatch, examples, **changes):
  """Returns the last stage of `dann` on the embedded pair, changed."""
  monkeypatch.setitem(alignment.ALIGNMENTS, 'mean_distance', examples['mean_distance'])
  monkeypatch.setitem(methods.METHODS, 'watched', examples['watched'])
  config = resolve(digits_domains.get_config('dann,epochs=1.0'))
  return build.build(config | changes, devices=1).last


def a_step(stage):
  arrays = {name: stream.arrays for name, stream in stage.streams.items()}
  key, payloads = jax.random.key(0), train.payloads_at(stage.streams, 0)
  batches = train.batches_at(stage.streams, arrays, payloads, key, 0)
  state = jax.jit(stage.method.init)(key, batches)
  after, metrics = jax.jit(stage.method.step)(state, batches)
  return state, after, {name: float(np.sum(v / n)) for name, (v, n) in metrics.items()}


def test_the_alignment_is_one_of_aligned(examples, monkeypatch):
  stage = two_domains(
    monkeypatch,
    examples,
    method={'name': 'aligned', 'statistics': 'separate'},
    alignment={'name': 'mean_distance', 'align_on': ['features'], 'weight': 1.0},
    players={},
  )
  _, _, metrics = a_step(stage)
  assert metrics['alignment'] > 0


def test_the_method_of_two_players_moves_both(examples, monkeypatch):
  critic = {
    'network': {'name': 'mlp'},
    'optimizer': {'name': 'sgd', 'momentum': 0.9},
    'schedule': {'name': 'constant', 'base': 0.1},
  }
  stage = two_domains(
    monkeypatch, examples, method={'name': 'watched'}, players={'critic': critic}
  )
  before, after, metrics = a_step(stage)
  assert metrics['critic_loss'] > 0 and int(after.step) == 1
  for player in ('net', 'critic'):
    moved = jax.tree.map(
      lambda a, b: bool((a != b).any()), before.params[player], after.params[player]
    )
    assert any(jax.tree.leaves(moved))


def test_maths_of_docstrings_is_made_for_the_site():
  pytest.importorskip('griffe')
  markdown = runpy.run_path(str(ROOT / 'docs/site/maths.py'))['markdown']
  text = 'Half of :math:`x^2`.\n\n.. math::\n  a &= b \\\\\n  c &= d\n\nover all.'
  assert markdown(text) == (
    'Half of $x^2$.\n\n\n$$\n\\begin{aligned}\na &= b \\\\\nc &= d\n'
    '\\end{aligned}\n$$\n\nover all.'
  )
  text = (ROOT / 'lt_jax/methods/adversarial.py').read_text()
  assert '.. math' not in markdown(text) and markdown(text).count('$$') >= 4
