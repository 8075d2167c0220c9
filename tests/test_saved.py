"""Outputs saved by a stage reach the batches of a later stage, image by image."""

import numpy as np
import pytest

from lt_jax import build, run
from lt_jax.config import apply, base_config, open_stages, resolve
from lt_jax.errors import UserError
from lt_jax.methods import METHODS
from lt_jax.recipes import apply_recipe

SAVES = ('confidence', 'prediction', 'entropy', 'distance', 'features')
ROW = {
  'domain': 'target',
  'labels': False,
  'stage': 'train',
  'arrays': {'label': 'prediction', 'weight': 'confidence', 'seen': 'features'},
  'order': 'entropy',
}


def config(row=ROW, saves=SAVES, **second):
  """Self-training: a source, then target images labelled by their predictions."""
  made = base_config()
  data = {
    'source': 'fake',
    'fake': {'classes': 3, 'train': 30, 'largest': 12, 'smallest': 8, 'test': 2},
  }
  overrides = {
    'name': 'saved',
    'data': data,
    'domains': {'other': {'train_split': 'train'}},
    'target': ('other',),
    'batch': 8,
    'eval_batch': 8,
    'epochs': 2.0,
    'model': {'trunk': 'tiny_cnn', 'trunk_options': {'width': 4}},
  }
  apply(made, overrides)
  made = resolve(open_stages(apply_recipe(made, 'source_only')))
  later = {
    'streams': {'train': row},
    'sampler': {'name': 'curriculum', 'first': 0.25, 'window': 'expand'},
  }
  made['stages'] = {
    'train': {'save_outputs': ['features', *(f'target/train/{n}' for n in saves)]},
    'self': {**later, **second},
  }
  made['stage_order'] = ['train', 'self']
  return made


def permuted(experiment):
  """The data sets with the target's training labels permuted."""
  other = experiment.domains['other']
  images = other.splits['train']
  labels = np.random.default_rng(0).permutation(images.labels)
  splits = other.splits | {'train': images._replace(labels=labels)}
  return experiment.domains | {'other': other._replace(splits=splits)}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of both stages: its folder, and what the first stage saved."""
  workdir = tmp_path_factory.mktemp('saved')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('jax.device_count', lambda: 1)
    result = run.run(config(), workdir)
  return result, dict(np.load(workdir / 'stages/train/arrays.npz'))


def second_stream(made, found, **given):
  stage = build.build(made, devices=1, **given).stages['self']
  left = stage.reads['train']
  return stage, left.into(stage.streams['train'], found, lambda tree: tree)


def test_images_come_in_their_order_with_what_was_saved_of_them(finished):
  result, found = finished
  assert not result['uses_target_labels']
  stage, stream = second_stream(config(), found)
  images = stage.images['target/train']
  place = {row: place for place, row in enumerate(images.rows.tolist())}
  easiest = np.argsort(found['target/train/entropy'], kind='stable')
  count = len(easiest) // 4
  first = [stream.payload(step) for step in range(len(easiest) // 8)]
  for payload in first:
    at = [place[row] for row in payload['index'].tolist()]
    for name, output in ROW['arrays'].items():
      np.testing.assert_array_equal(payload[name], found[f'target/train/{output}'][at])
    assert set(at) <= set(easiest[:count].tolist())
  shapes = stream.payload_shapes()
  assert {n: (s.shape, s.dtype) for n, s in shapes.items()} == {
    n: (x.shape, x.dtype) for n, x in first[0].items()
  }


def test_a_method_gets_no_counts_of_unlabelled_images(monkeypatch):
  seen = []

  def spy(net, optimizer, loss, *, class_weights, reduction, counts):
    seen.append(counts.tolist())
    parts = {'class_weights': class_weights, 'reduction': reduction}
    return METHODS['supervised'](net, optimizer, loss, **parts)

  monkeypatch.setitem(METHODS, 'spy', spy)
  made = config(method={'name': 'spy'})
  counts = build.build(made, devices=1).domains['source'].counts
  assert seen == [[counts.sum() // 3] * 3] and len(set(counts.tolist())) > 1


def test_a_distance_from_the_source_is_saved_too(finished):
  _, found = finished
  units = {
    split: x / np.linalg.norm(x, axis=1, keepdims=True)
    for split in ('', 'target/train/')
    for x in [found[f'{split}features'].astype(np.float64)]
  }
  expected = 1 - units['target/train/'] @ units[''].mean(0)
  np.testing.assert_allclose(found['target/train/distance'], expected, atol=1e-5)


def test_labels_of_the_target_do_not_reach_the_second_stage(finished):
  _, found = finished
  experiment = build.build(config(), devices=1)
  _, one = second_stream(config(), found)
  _, two = second_stream(config(), found, datasets=permuted(experiment))
  for step in range(6):
    before, after = one.payload(step), two.payload(step)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
  ('row', 'more', 'message'),
  [
    ({'stage': 'nowhere'}, {}, "unknown earlier stage of streams.train 'nowhere'"),
    ({'arrays': {'label': 'logits'}}, {}, "does not save 'target/train/logits'"),
    ({'arrays': {'image': 'features'}}, {}, "the batch already has 'image'"),
    ({'order': 'features'}, {}, "streams.train.order: 'features' has"),
    ({'order': ''}, {}, "sampler 'curriculum' needs an order"),
    ({}, {'sampler': {'name': 'instance'}}, 'does not use an order'),
    ({'labels': True}, {}, "the batch already has 'label'"),
    ({'domain': 'source'}, {}, "does not save 'prediction'"),
  ],
)
def test_mistakes_are_one_line(row, more, message):
  with pytest.raises(UserError, match=message) as error:
    build.build(config({**ROW, **row}, **more), devices=1)
  assert '\n' not in str(error.value)


def test_an_unknown_output_is_reported_before_training(tmp_path):
  made = config(saves=(*SAVES, 'logit'))
  with pytest.raises(UserError, match="unknown output 'logit'; did you mean 'logits'"):
    run.rehearsed(made, tmp_path)
