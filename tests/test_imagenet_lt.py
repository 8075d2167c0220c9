"""OLTR's two stages on a miniature ImageNet-LT, from lists and from TFDS."""

import json
import pathlib
import zlib

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from configs import imagenet_lt
from lt_jax import build, checkpoint, evaluate, run, sharding, train
from lt_jax.config import resolve
from lt_jax.data import reading
from lt_jax.data import streams as data_streams
from lt_jax.errors import UserError
from lt_jax.screen import Screen
from lt_jax.stage import StageRunner
from lt_jax.stopping import StopRequest
from lt_jax.writers import Events, read_rows
from tests import mini
from tests.test_pretrained import tiny_state

pytestmark = pytest.mark.usefixtures('one_device')


SMALL = {
  'data.image_size': 32,
  'data.resize': 36,
  'data.workers': 0,
  'data.many_shot': 5,
  'data.few_shot': 2,
  'batch': 8,
  'eval_batch': 127,
  'log_every_steps': 2,
}
"""Settings that make a step fast; data path and steps are added."""


def config(recipe, **overrides):
  """Returns the config with a trunk that compiles in no time."""
  made = imagenet_lt.get_config(f'{recipe},epochs=0.05')
  made.model.trunk, made.model.trunk_options = 'digits_cnn', {'width': 8}
  made.update_from_flattened_dict({**SMALL, **overrides})
  return resolve(made)


@pytest.fixture(scope='module')
def lists(tmp_path_factory):
  rng = np.random.default_rng(0)
  folder, root = mini.write_lists(tmp_path_factory.mktemp('lists'), rng)
  return {'data.source': f'list:{folder}', 'data.dir': str(root)}


@pytest.fixture(scope='module')
def tfds(tmp_path_factory):
  rng = np.random.default_rng(0)
  folder = mini.write_tfds(tmp_path_factory.mktemp('tfds'), rng)
  return {'data.source': 'tfds:imagenet_lt', 'data.dir': str(folder)}


@pytest.fixture(scope='module')
def finished(lists, tmp_path_factory):
  """The folder of a finished run from lists."""
  workdir = tmp_path_factory.mktemp('run')
  run.run(config('oltr', **lists), workdir)
  return workdir


def test_two_stages_from_lists(finished):
  result = json.loads((finished / 'result.json').read_text())
  assert result['stage'] == 'memory'
  assert result['select'] == 'val/accuracy'
  assert {'accuracy', 'many', 'few', 'auroc', 'f_measure_oltr2019'} <= set(
    result['test']
  )
  assert 'auroc' in result['test_by_energy']
  facts = json.loads((finished / 'data.json').read_text())
  assert facts['counts']['train'] == list(mini.COUNTS)
  assert facts['open_images'] == {'open_test': 4}
  assert facts['image_shape'] == [32, 32, 3]
  stages = {path.name for path in (finished / 'stages').iterdir()}
  assert stages == {'plain', 'memory'}
  with np.load(finished / 'open_set.npz') as curves:
    assert (np.diff(curves['known_score/threshold']) < 0).all()


def test_images_that_moved_are_evaluated_again(finished, lists):
  root = pathlib.Path(lists['data.dir'])
  moved = root.rename(root.with_name('moved'))
  try:
    with pytest.raises(UserError, match='give --data_dir='):
      evaluate.evaluate(epath.Path(finished))
    again = evaluate.evaluate(epath.Path(finished), data_dir=str(moved))
  finally:
    moved.rename(root)
  last = read_rows(finished / 'metrics.jsonl')[-1]
  assert again['test']['accuracy'] == pytest.approx(last['accuracy'])


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_the_same_images_from_tfds(lists, tfds, split):
  """Bit for bit, and cropped at the same places."""
  ours, theirs = (build.build(config('ce', **source)) for source in (tfds, lists))
  for step in range(2):
    batches = [
      x.stages['train'].streams['train'].payload(step)
      if split == 'train'
      else x.passes[split].stream.payload(step)
      for x in (ours, theirs)
    ]
    assert batches[0].keys() == batches[1].keys()
    for name in batches[0]:
      np.testing.assert_array_equal(batches[0][name], batches[1][name])


@pytest.mark.slow
def test_the_same_run_from_tfds(finished, tfds, tmp_path):
  """Without the open set, but otherwise a run with the same digest."""
  run.run(config('oltr', **tfds), tmp_path)
  ours, theirs = (
    json.loads((folder / 'result.json').read_text()) for folder in (tmp_path, finished)
  )
  assert 'auroc' not in ours['test']
  assert ours['state_sha256'] == theirs['state_sha256']


def test_crops_are_a_function_of_the_position(lists):
  experiment = build.build(config('ce', **lists))
  stream = experiment.stages['train'].streams['train']
  first, again, later = (stream.payload(step)['image'] for step in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert first.shape == (8, 32, 32, 3) and first.dtype == np.uint8
  assert (first != later).any()


@pytest.mark.parametrize(
  'kind', [pytest.param('lists', marks=pytest.mark.slow), 'tfds']
)
def test_worker_processes_make_the_same_batches(request, kind, monkeypatch):
  monkeypatch.setattr(data_streams, 'SMALL_PASS', 7)
  source = request.getfixturevalue(kind)
  experiment = build.build(config('ce', **source, **{'data.workers': 1}))
  streams = experiment.stages['train'].streams | {
    'test': experiment.passes['test'].stream
  }
  for name, stream in streams.items():
    assert stream.workers == 1
    with reading.reading({name: stream}, 0, 1) as read:
      made = read(name, 0)
    direct = stream.payload(0)
    assert made.keys() == direct.keys() == stream.payload_shapes().keys()
    for key, shape in stream.payload_shapes().items():
      np.testing.assert_array_equal(made[key], direct[key])
      assert (made[key].shape, made[key].dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'stage_order': ('memory',)}, "no finished stage 'plain'; known: no stage before"),
    ({'data.image_size': 0}, 'differ in size: set data.image_size'),
    ({'data.resize': 30}, 'data.resize is 30, less than data.image_size 32'),
    ({'data.test_split': 'tset'}, 'has no tset split, only train, val, test, open'),
    ({'data.known_classes': 9}, 'open images of its own: set data.known_classes to 0'),
    ({'stages.memory.model.projection': 5}, r'kernel is \(5, 1000\) here'),
  ],
)
def test_mistakes_are_reported_before_anything_runs(
  lists, tmp_path, overrides, message
):
  with pytest.raises(UserError, match=message):
    run.run(config('oltr', **lists, **overrides), tmp_path)
  assert not (tmp_path / 'stages').exists()


def test_a_run_starts_from_published_weights(lists, tmp_path, capsys, monkeypatch):
  """Without steps, which take long to compile for such a network."""

  def at_once(method, streams, state, *, hooks, **rest):
    hooks.save(0, state)
    return state

  monkeypatch.setattr(train, 'train', at_once)
  weights = tmp_path / 'tiny.safetensors'
  save_file(tiny_state(), weights)
  options = {'init': str(weights), 'model.trunk': 'resnet10'}
  options['model.trunk_options'] = {'width': 4}
  begun = config('ce', **lists, **options, select='last')
  workdir = tmp_path / 'run'
  result = run.run(begun, workdir)
  printed = capsys.readouterr().out.splitlines()
  assert ['weights', str(weights)] in [line.split() for line in printed]
  assert result['init']['source'] == str(weights)
  assert len(result['init']['sha256']) == 64
  facts = next(
    row
    for row in read_rows(workdir / 'events.jsonl')
    if row['event'] == 'began_with_weights'
  )
  assert facts['fresh'] == ['head/bias', 'head/kernel']
  experiment = build.build(begun)
  stage = experiment.stages['train']
  shapes = train.state_shapes(stage.method, stage.streams)
  saved = checkpoint.Checkpoints(workdir / 'stages' / 'train' / 'checkpoints', keep=1)
  target = checkpoint.abstract(shapes, sharding.replicated(experiment.mesh))
  kernel = saved.restore(target).state.params['net']['trunk']['conv']['kernel']
  ours = np.asarray(kernel).transpose(3, 2, 0, 1)
  np.testing.assert_array_equal(ours, tiny_state()['conv1.weight'])

  weights.unlink()
  again = run.run(begun, workdir)  # no longer needs the file
  assert again['state_sha256'] == result['state_sha256']
  with pytest.raises(UserError, match='there is no file'):
    run.run(begun, tmp_path / 'another')


def test_weights_of_another_network_are_rejected_before_anything_runs(lists, tmp_path):
  weights = tmp_path / 'tiny.safetensors'
  save_file(tiny_state(), weights)
  options = {'model.trunk': 'resnet10', 'model.trunk_options': {'width': 8}}
  wider = config('ce', **lists, **options, **{'init': str(weights)})
  with pytest.raises(UserError, match='conv'):
    run.run(wider, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'stages').exists()


@pytest.fixture
def damaged(tmp_path):
  """Lists in which the first image of class 0 is truncated."""
  folder, root = mini.write_lists(tmp_path / 'damaged', np.random.default_rng(0))
  file = root / 'train' / 'n00000000' / 'train_0.JPEG'
  file.write_bytes(file.read_bytes()[:400])
  return {'data.source': f'list:{folder}', 'data.dir': str(root)}, file


def test_a_stand_in_is_the_next_image_of_the_class(damaged):
  data, _ = damaged
  experiment = build.build(config('ce', **data, **{'data.on_bad_image': 'skip'}))
  split = experiment.dataset.splits['train']
  stream = experiment.stages['train'].streams['train']
  steps = range(round(len(split.rows) / 8))
  found = [p for p in map(stream.payload, steps) if p['bad'].any()]
  assert len(found) == 1  # in an epoch
  (place,) = np.flatnonzero(found[0]['bad'])
  assert found[0]['index'][place] == 0 and found[0]['label'][place] == 0
  step = next(s for s in steps if stream.payload(s)['bad'].any())
  generator = np.random.default_rng((0, zlib.crc32(b'train'), step * 8 + place))
  np.testing.assert_array_equal(
    found[0]['image'][place], split.example(split.rows[1], generator)['image']
  )
  assert 'train' not in experiment.passes
  with pytest.raises(UserError, match=r'n00000000/train_0\.JPEG: a damaged image'):
    split.image(0)


def test_training_and_meta_images_are_cropped_by_other_random_numbers(damaged):
  data, _ = damaged
  options = {'data.meta_per_class': 1, 'data.meta_in_train': True}
  options |= {'data.meta_split': 'train', 'data.on_bad_image': 'skip'}
  experiment = build.build(config('meta_ce', **data, **options))
  streams = experiment.stages['meta'].streams
  assert streams.keys() == {'train', 'meta'}
  for name, stream in streams.items():
    found = stream.payload(1)
    generator = np.random.default_rng((0, zlib.crc32(name.encode()), len(found['bad'])))
    split = experiment.dataset.splits[name]
    np.testing.assert_array_equal(
      found['image'][0], split.example(found['index'][0], generator)['image']
    )


def test_damaged_images_are_reported_once_and_must_be_few(damaged, tmp_path):
  data, file = damaged
  experiment = build.build(config('ce', **data, **{'data.on_bad_image': 'skip'}))
  screen, stop = Screen(), StopRequest()
  events = Events(epath.Path(tmp_path), screen)

  def begun():
    return StageRunner(
      experiment,
      experiment.stages['train'],
      epath.Path(tmp_path),
      screen,
      events,
      stop,
      None,
      lambda row: None,
      {},
    )

  for _ in range(2):  # the second time as a resumed run
    runner = begun()
    for positions in ([0, 0], [0]):
      runner._bad_images('train', np.array(positions))
      runner._report_bad_images()
  rows = read_rows(tmp_path / 'events.jsonl')
  assert [row['image'] for row in rows] == [str(file)]
  runner._bad_images('train', np.arange(10))
  runner._report_bad_images()
  runner._bad_images('train', np.array([10]))
  message = '11 images of train cannot be read, but at most 10 of 1015 may be replaced'
  with pytest.raises(UserError, match=message):
    runner._report_bad_images()


def test_a_damaged_image_ends_a_run_unless_it_may_continue(damaged):
  data, _ = damaged
  stream = build.build(config('ce', **data)).stages['train'].streams['train']
  with (
    pytest.raises(UserError, match=r'train_0\.JPEG: a damaged image'),
    reading.reading({'train': stream}, 0, 127) as read,
  ):
    for step in range(127):
      read('train', step)
