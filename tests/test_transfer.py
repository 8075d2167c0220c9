"""Transfer in one run: tasks of digits, kept classes, a source and a target."""

import json

import numpy as np
import pytest

from configs import digits_transfer, fine_grained, transfer
from lt_jax import build, evaluate, run
from lt_jax.config import resolve, stage_config
from lt_jax.data.dataset import load_dataset
from lt_jax.data.digit_tasks import TASKS, digit_task
from lt_jax.data.keeping import Kept, class_list, keep_classes
from lt_jax.data.sources import fingerprint
from lt_jax.errors import UserError
from lt_jax.protocols.fine_grained import TARGETS

pytestmark = pytest.mark.usefixtures('one_device')


def test_no_digit_is_in_a_source_and_in_a_target():
  halves = {0: set(), 1: set()}
  for name, (half, groups) in TASKS.items():
    splits = digit_task(name, None)
    pixels = {
      split: {image.tobytes() for image in one.images} for split, one in splits.items()
    }
    assert not pixels['train'] & pixels['test']
    halves[half] |= pixels['train'] | pixels['test']
    assert splits['train'].class_names == tuple(groups)
    assert set(splits['train'].labels) == set(range(len(groups)))
  assert not halves[0] & halves[1]
  one = digit_task('one', None)['train']
  parity, fine = one.attributes['parity'], one.attributes['fine']
  assert set(fine[one.labels == 1]) == {1} and (parity == fine % 2).all()
  assert one.attributes['ink'].dtype == np.float32


def test_kept_classes_are_the_only_classes(tmp_path):
  sources = digit_task('digits', None)
  few = keep_classes(sources, ('7', '2'), 'digits')['train']
  whole = sources['train']
  assert few.class_names == ('2', '7')
  rows = np.flatnonzero((whole.labels == 2) | (whole.labels == 7))
  np.testing.assert_array_equal(few.images, whole.images[rows])
  np.testing.assert_array_equal(few.labels, (whole.labels[rows] == 7))
  lazy = Kept(whole, rows, few.labels, few.class_names)
  np.testing.assert_array_equal(lazy[3], few.images[3])
  assert fingerprint(lazy, np.arange(9)) == fingerprint(few, np.arange(9))
  listed = tmp_path / 'keep_classes.txt'
  listed.write_text('2\n7\n')
  loaded = load_dataset(
    'digits_tasks:digits', to_device=lambda x: x, keep_classes=str(listed)
  )
  assert loaded.class_names == ('2', '7')
  assert set(loaded.tests['test'].labels) == {0, 1}


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('1+1', 'must name classes, each only once'),
    ('none.txt', 'there is no file none.txt'),
    ('1+11', "digits has no class '11'"),
  ],
)
def test_impossible_lists_are_reported(text, message):
  with pytest.raises(UserError, match=message):
    keep_classes(digit_task('digits', None), class_list(text), 'digits')


@pytest.mark.parametrize('recipe', ['frozen', 'chop', 'ldam_drw', 'crt', 'l2_sp'])
def test_settings_of_a_recipe_do_not_apply_to_the_source(recipe):
  """Whatever is done on the target, the first stage is the same training."""
  config = resolve(digits_transfer.get_config(recipe))
  plain = resolve(digits_transfer.get_config('ce'))
  source, expected = (stage_config(c, 'source') for c in (config, plain))
  differing = {key for key in source if source[key] != expected[key]}
  assert differing <= {'recipe', 'stages', 'stage_order', 'defer_epoch'}
  assert source['kept_layers'] == '' and source['surgeries'] == []
  first = stage_config(config, config['stage_order'][1])
  assert first['surgeries'][0][0] == 'copy' and first['domain'] == 'task'


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
  """The folder of a run: a union of two sources, then a frozen trunk."""
  config = digits_transfer.get_config('frozen,epochs=2')
  config.model.trunk_options = {'width': 2}
  config.stages.source.epochs = 1.0
  folder = tmp_path_factory.mktemp('transfer') / 'run'
  run.run(resolve(config), folder)
  return folder


def test_a_run_of_a_source_and_a_target(ran):
  result = json.loads((ran / 'result.json').read_text())
  assert result['stage'] == 'train' and 0 <= result['test']['accuracy'] <= 1
  rows = json.loads((ran / 'stages/train/parameters.json').read_text())
  assert {row['part']: row['most'] for row in rows} == {'trunk': 0, 'head': 1}
  assert len(json.loads((ran / 'data.json').read_text())['class_names']) == 10


def test_a_union_is_measured_on_each_of_its_sources(ran):
  measured = evaluate.evaluate(ran, stage_name='source')
  domains = measured['domains']
  assert [*domains] == ['round', 'straight']
  mean = np.mean([domains[name]['accuracy'] for name in domains])
  assert measured['test']['accuracy'] == pytest.approx(mean)


def test_custom_sources_build():
  config = resolve(transfer.get_config('frozen,source=fake+fake,net=resnet10,size=32'))
  experiment = build.build(config)
  assert [*experiment.stages] == ['source', 'train']
  assert experiment.stages['source'].dataset.counts.sum() == 2000  # of both
  assert experiment.stages['train'].dataset.counts.sum() == 1000


@pytest.mark.parametrize('target', TARGETS)
def test_targets_of_transfer_have_the_sizes_of_their_papers(target):
  """On generated images of as many classes."""
  config = fine_grained.get_config(f'frozen,target={target},net=resnet10')
  config.data.source = 'fake'
  made = TARGETS[target]
  config = resolve(config)
  experiment = build.build(config, devices=1)
  data = experiment.dataset
  assert len(data.class_names) == made.classes
  expected = made.per_class or made.train // made.classes
  cut = 0 if made.test else min(2000, made.train // made.classes // 5)
  assert set(data.counts) == {expected - cut}
  if made.test:
    assert len(data.tests['test'].rows) == made.test
