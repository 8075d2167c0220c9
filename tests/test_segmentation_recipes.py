"""Adaptation recipes for segmentation, on the embedded pair of scenes."""

import json
import shutil

import jax
import numpy as np
import pytest

from configs import scenes as config_file
from lt_jax import build, run, train
from lt_jax.config import resolve
from lt_jax.data import samplers, scenes
from lt_jax.errors import UserError
from lt_jax.recipes import segmentation
from lt_jax.writers import read_rows
from tests import child

pytestmark = pytest.mark.usefixtures('one_device')

TINY = {'train': 16, 'val': 8, 'test': 8}


@pytest.fixture(autouse=True)
def few(monkeypatch):
  monkeypatch.setattr(scenes, 'SPLITS', TINY)


def config(arg, **changes):
  made = config_file.get_config(f'{arg},train=16,steps=4')
  made.update(batch=8, eval_batch=8, log_every_steps=2)
  made.model.trunk_options = {'width': 4}
  for key in ('save_every_epochs', 'evaluate_every_epochs'):
    made[key] = 1.0  # two steps
  for player in made.players.values():
    player.network.width = 4
  made.update_from_flattened_dict(changes)
  return resolve(made)


@pytest.fixture(scope='module')
def datasets():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scenes, 'SPLITS', TINY)
    return build.build(config('source_only'), devices=1).domains


ENTROPY, JUDGED = {'alignment'}, {'lambda', 'adversarial', 'domain_loss'}
METRICS = {
  'minent': ENTROPY,
  'minent_cp': ENTROPY,
  'advent': JUDGED,
  'advent_cp': JUDGED | {'alignment'},
  'adapt_seg': JUDGED,
  'mean_teacher': {'pseudo_loss', 'labelled'},
  'label_prior': {'label_prior'},
  'ocda': JUDGED,
  'ocda_entropy': ENTROPY,
}
STEPLESS = {'advent_minent'}
"""Recipes whose last stage makes no steps."""


def test_every_recipe_has_metrics_here():
  assert set(segmentation.RECIPES) - STEPLESS <= set(METRICS)


ALIKE = {'advent_cp', 'ocda_entropy'}
"""Recipes that only combine what others do."""


@pytest.mark.parametrize(
  'recipe',
  [
    pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ())
    for name in METRICS
  ],
)
def test_every_recipe_makes_a_step_without_labels_of_the_target(recipe, datasets):
  experiment = build.build(config(recipe), devices=1, datasets=datasets)
  stage = experiment.last
  state = train.state_shapes(stage.method, stage.streams)
  metrics = train.metric_shapes(stage.method, stage.streams, state, experiment.mesh)
  assert METRICS[recipe] <= metrics.keys()
  assert not stage.uses_target_labels
  assert ('discriminator' in state.params) == (METRICS[recipe] >= JUDGED)


@pytest.mark.parametrize('recipe', ['lade', 'mcd'])
def test_what_compares_whole_images_is_told(recipe, datasets):
  experiment = build.build(config(recipe), devices=1, datasets=datasets)
  stage = experiment.last
  state = train.state_shapes(stage.method, stage.streams)
  with pytest.raises(UserError, match='compares whole images, but here every pixel'):
    train.metric_shapes(stage.method, stage.streams, state, experiment.mesh)


def test_a_mean_teacher_is_shown_rare_classes(datasets):
  experiment = build.build(config('mean_teacher'), devices=1, datasets=datasets)
  rows = experiment.last.streams['train'].payload(0)['index']
  pixels = datasets['source'].splits['train'].class_pixels(len(scenes.CLASSES))
  sampler = samplers.rare_class(pixels, temperature=0.01)
  np.testing.assert_array_equal(rows, samplers.batch_indices(sampler, 0, 8, 0))
  rarest = pixels.sum(0).argmin()
  assert (pixels[rows, rarest] > 0).mean() > (pixels[:, rarest] > 0).mean()
  made = config('minent') | {'sampler': {'name': 'class_balanced'}}
  with pytest.raises(UserError, match="have label maps; use 'rare_class'"):
    build.build(made, devices=1, datasets=datasets)


@pytest.mark.parametrize('recipe', ['minent', 'advent', 'adapt_seg'])
def test_an_auxiliary_output_is_adapted_too(recipe):
  made = config_file.get_config('source_only,train=16,steps=4')
  made.model.head_options = {'auxiliary': 'conv4'}
  overrides = segmentation.RECIPES[recipe].overrides(made)
  assert overrides['alignment']['align_on'] == ('logits', 'auxiliary_logits')
  if recipe != 'minent':
    assert set(overrides['players']) == {'discriminator', 'auxiliary_discriminator'}
    rate = overrides['players']['auxiliary_discriminator']['schedule']
    assert rate['base'] == 1e-4 and rate['name'] == made.schedule.name


def assert_resumes(recipe, workdir):
  """Runs, removes the last stage after its first checkpoint, and runs again."""
  made = config(recipe)
  result = run.run(made, workdir)
  rows = _untimed(workdir)
  checkpoints = workdir / 'stages' / result['stage'] / 'checkpoints'
  steps = sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
  assert steps[0] == 2 and steps[-1] == 4
  shutil.rmtree(checkpoints / '4')
  (workdir / 'result.json').unlink()
  again = run.run(made, workdir)
  assert again['state_sha256'] == result['state_sha256']
  assert _untimed(workdir) == rows
  return result


def _untimed(workdir):
  return [
    {key: value for key, value in row.items() if key != 'images_per_second'}
    for row in read_rows(workdir / 'metrics.jsonl')
  ]


@pytest.mark.slow
def test_advent_runs_from_end_to_end_and_resumes_bit_by_bit(tmp_path):
  result = assert_resumes('advent', tmp_path)
  assert not result['uses_target_labels']
  assert 0 <= result['test']['miou'] <= 1
  assert set(result['domains']) == {'real', 'source', 'snow'}


@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['minent_cp', 'mean_teacher', 'label_prior'])
def test_other_recipes_run_and_resume_bit_by_bit(recipe, tmp_path):
  assert_resumes(recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['advent', 'mean_teacher'])
def test_runs_on_one_two_and_eight_devices_agree(recipe):
  found = {}
  for devices in (1, 2, 8):
    made = config(recipe)
    experiment = build.build(made, devices=devices)
    stage = experiment.last
    state = train.initial_state(
      stage.method, stage.streams, jax.random.key(0), experiment.mesh
    )
    arrays = {name: stream.arrays for name, stream in stage.streams.items()}
    for step in range(3):
      payloads = train.payloads_at(stage.streams, step)
      batches = train.batches_at(stage.streams, arrays, payloads, state.key, step)
      state, _ = jax.jit(stage.method.step)(state, batches)
    found[devices] = jax.device_get(state.params)
  for devices in (2, 8):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
      found[devices],
      found[1],
    )


@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['advent', 'mean_teacher'])
def test_kill_9_in_a_save_ends_in_the_same_run(recipe, tmp_path):
  """With the command itself, in separate processes."""
  fast = (
    "--config.model.trunk_options={'width':4}",
    '--config.log_every_steps=2',
    '--config.save_every_epochs=1',
    '--config.evaluate_every_epochs=4',
  )
  options = {'config': f'scenes.py:{recipe},train=16,steps=6', 'fast': fast}

  def result_of(name, fault=''):
    workdir = tmp_path / name
    log = tmp_path / f'{name}.log'
    code = child.run(child.command(workdir, **options), log, fault)
    if fault:
      assert code < 0, log.read_text()
      return None
    assert code == 0, log.read_text()
    return json.loads((workdir / 'result.json').read_text()), log.read_text()

  unbroken, _ = result_of('unbroken')
  result_of('run', 'kill_in_save:2')
  resumed, printed = result_of('run')
  assert 'resuming from 2' in printed
  assert resumed['state_sha256'] == unbroken['state_sha256']
