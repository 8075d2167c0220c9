"""Seen, unseen and unknown classes in one run; classes are added after training."""

import csv
import itertools
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from configs import digits_zero_shot, open_world
from lt_jax import build, predict, report, run, trained
from lt_jax.config import resolve
from lt_jax.errors import UserError
from lt_jax.evals.ordering import top_of_class
from lt_jax.files import read_npz
from tests import child

KEYS = ('seen', 'unseen', 'harmonic_mean', 'unknown')


def made(recipe='eszsl'):
  config = open_world.get_config(f'{recipe},epochs=4')
  config.model.trunk = 'tiny_cnn'
  config.eval_batch = 100
  return resolve(config)


@pytest.fixture(scope='module')
def trained_run(tmp_path_factory, one_device):
  """Returns (folder, result, images of the unknown class 8 with their predictions)."""
  folder = tmp_path_factory.mktemp('open')
  result = run.run(made(), folder / 'run')
  split = build.build(made(), devices=1).dataset.tests['open_test']
  (folder / 'images').mkdir()
  for place, row in enumerate(split.rows[:40]):
    image = Image.fromarray(split.image(row)[..., 0])
    image.save(folder / 'images' / f'{place:03d}.png')
  return folder, result


def test_the_three_settings_are_in_one_result(trained_run):
  folder, result = trained_run
  test = result['test']
  assert all(0 <= test[key] <= 1 for key in KEYS)
  assert test['unknown'] == test['open_accuracy']
  h = 2 * test['seen'] * test['unseen'] / max(test['seen'] + test['unseen'], 1e-9)
  assert test['harmonic_mean'] == pytest.approx(h)
  stored = read_npz(folder / 'run' / 'predictions.npz')
  unseen = np.isin(stored['label'], (3, 5))
  right = stored['label'] == stored['prediction']
  assert test['unseen'] == pytest.approx(right[unseen].mean())  # equally many of each
  assert test['seen'] == pytest.approx(right[~unseen].mean())
  facts = json.loads((folder / 'run' / 'data.json').read_text())
  assert facts['unseen'] == ['3', '5'] and facts['val_classes'] == ['1', '4']
  assert facts['counts']['train'][3] == 0 and facts['class_vectors'] == [8, 7]
  chosen = result['memory']
  assert (
    chosen['calibrated_stacking.g'] > 0 and chosen['calibrated_stacking.gamma'] != 0
  )


def read(path):
  with path.open() as file:
    return list(csv.DictReader(file))


def test_a_class_is_added_by_the_command_line(trained_run):
  """The network has never heard of 8 and 9 until a file describes them."""
  folder, _ = trained_run
  new = folder / 'new.csv'
  codes = {'8': np.ones(7), '9': np.array([1, 1, 1, 1, 0, 1, 1])}
  pairs = itertools.combinations(np.eye(7), 2)  # and symbols that are not digits
  codes |= {
    f'sign {i}': a + b for i, (a, b) in enumerate(pairs) if (a + b)[1:3].sum() < 2
  }
  rows = [','.join([name, *map(str, code)]) for name, code in codes.items()]
  new.write_text('\n'.join(['class,a,b,c,d,e,f,g', *rows]))
  command = [
    f'--workdir={folder}/run',
    f'{folder}/images',
    f'--out={folder}/with.csv',
    f'--class_vectors={new}',
    '--top=3',
  ]
  log = folder / 'log'
  assert child.run(command, log, module='lt_jax.predict') == 0, log.read_text()
  without = folder / 'without.csv'
  predict.predict(epath.Path(folder / 'run'), [f'{folder}/images'], str(without), top=8)
  with_new = read(folder / 'with.csv')
  assert {row['prediction'] for row in read(without)} <= set('01234567')
  assert {row['prediction'] for row in with_new} & codes.keys()
  # What the closed form predicts with the new descriptions besides the old ones.
  network = trained.open_run(epath.Path(folder / 'run'))
  net = network.state
  kernel = np.asarray(net.params['net']['head']['kernel'], np.float64)
  pixels = np.stack(
    [np.asarray(Image.open(folder / 'images' / f'{i:03d}.png')) for i in range(40)]
  )
  outputs = network.predict(net, pixels[..., None])
  old = np.asarray(net.stats['net']['head']['class_vectors'], np.float64)
  rows = np.vstack([old, *codes.values()])
  unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  scores = np.asarray(outputs['features'], np.float64) @ kernel @ unit.T
  gamma = float(net.memory['calibrated_stacking']['gamma'])
  scores[:, [0, 1, 2, 4, 6, 7]] -= gamma
  names = [*'01234567', *codes]
  expected = [names[c] for c in scores.argmax(1)]
  same = np.mean(
    [a == row['prediction'] for a, row in zip(expected, with_new, strict=True)]
  )
  assert same > 0.97
  for text, message in (
    ('8,1,1\n9,1,0\n', 'described by 2 numbers, but the network was trained with 7'),
    ('8,1,1,1,1,1,1,x\n', "'8' .* has 'x'"),
    ('8,0,1,1,0,0,0,0\n', 'class 1 and class 8 have the same description'),
  ):
    new.write_text(text)
    with pytest.raises(UserError, match=message):
      predict.predict(
        epath.Path(folder / 'run'),
        [f'{folder}/images'],
        str(folder / 'none.csv'),
        class_vectors=[str(new)],
      )


def test_the_report_draws_the_curve(trained_run):
  folder, result = trained_run
  page = report.page.write(folder / 'run').read_text()
  for name in ('seen_unseen', 'described_errors', 'described_features'):
    assert (folder / 'run' / 'figures' / f'{name}.svg').exists(), name
  assert 'gamma chosen by validation classes' in page
  assert not (folder / 'run' / 'figures' / 'attributes.svg').exists()
  assert f'{100 * result["test"]["ausuc"]:.1f} %' in page


@pytest.mark.parametrize('recipe', ['ale', 'two_tower', 'dap', 'feature_generator'])
@pytest.mark.parametrize('module', [open_world, digits_zero_shot])
def test_other_recipes_build(module, recipe):
  experiment = build.build(resolve(module.get_config(recipe)), devices=1)
  first, *_, last = experiment.stages.values()
  assert last.plan.steps == 0 and first.plan.steps > 0
  seen = set(experiment.dataset.class_names) - {'3', '5'}
  assert len(seen) == len(experiment.dataset.class_names) - 2


def test_two_domains_have_the_three_settings():
  config = resolve(open_world.get_config('eszsl,target=blended'))
  stage = build.build(config, devices=1).last
  assert {'test', 'open_test', 'val', 'source/test'} <= set(stage.passes)
  assert set(stage.images['open_test'].labels.tolist()) == {-1}


@pytest.mark.slow
def test_zero_shot_across_domains(tmp_path, one_device):
  """Pseudo-labels reach unseen classes, and the result has both domains."""
  made = digits_zero_shot.get_config('zsda,target=inverted,epochs=2')
  made.model.trunk = 'tiny_cnn'
  for stage in made.stages.values():
    if 'align_on' in stage.alignment:
      stage.alignment.align_on = ('features',)
  result = run.run(resolve(made), tmp_path)
  for domain in ('source', 'inverted'):
    found = result['domains'][domain]
    assert all(0 <= found[key] <= 1 for key in KEYS[:3]), domain
  stored = read_npz(tmp_path / 'stages' / 'calibrated' / 'arrays.npz')
  labels = stored['target/train/top_of_class']
  assert len(labels) == 600 and 0.2 <= (labels >= 0).mean() < 0.25
  gamma = result['memory']['calibrated_stacking.gamma']
  assert gamma != 0 and not result['uses_target_labels']


def test_most_confident_pixels_of_every_class_are_labelled():
  logits = np.zeros((10, 3))
  logits[:7, 0] = np.arange(1, 8)
  logits[7:, 2] = [3, 1, 2]
  survey = type('', (), {'collect': lambda s, state, split, keep: keep(
    {'logits': logits}, {})})()  # fmt: skip
  labels = top_of_class(survey, None, split='target/train', portion=0.3)
  expected = [-1, -1, -1, -1, 0, 0, 0, 2, -1, -1]
  assert labels.tolist() == expected
  logits = logits.reshape(1, 5, 2, 3)  # for pixels
  labels = top_of_class(survey, None, split='target/train', portion=0.3)
  assert labels.shape == (1, 5, 2) and labels.ravel().tolist() == expected


def test_zsda_builds_and_names_no_label_of_the_target():
  config = resolve(digits_zero_shot.get_config('zsda,target=inverted'))
  experiment = build.build(config, devices=1)
  refine = experiment.last
  assert not any(s.uses_target_labels for s in experiment.stages.values())
  assert set(refine.reads) == {'target'} and refine.plan.steps > 0
  with pytest.raises(UserError, match="'class_vectors'|several|there is no target"):
    build.build(resolve(digits_zero_shot.get_config('zsda')), devices=1)
