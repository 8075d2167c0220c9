"""C-Digits, its small form and C-Faces: they build completely on local data."""

import os
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from configs import c_digits, c_digits_small, c_faces
from lt_jax import build, train
from lt_jax.config import resolve, stage_config
from lt_jax.data.arrays import Arrays
from lt_jax.data.sources import load_source
from lt_jax.data.streams import Unlabelled
from lt_jax.errors import UserError
from lt_jax.models import make_classifier

STAGES = ('source', 'centroids', 'adversarial', 'domain_factor', 'scheduled')


def write_digits(folder, rng, name, side, images=6):
  """Writes a .npz with a number of digits per class."""
  label = np.tile(np.arange(10), images)
  x = rng.integers(0, 256, (len(label), side, side), np.uint8)
  np.savez(folder / f'{name}.npz', x_train=x, y_train=label, x_test=x, y_test=label)


@pytest.fixture
def small(tmp_path, rng):
  """The config of the small form on small files with the right shapes."""
  for name, side in (('usps', 16), ('mnist', 28), ('mnistm', 32)):
    write_digits(tmp_path, rng, name, side)
  config = c_digits_small.get_config(f'ocda,epochs=4,files={tmp_path}')
  for domain in config.domains.values():
    domain.n_max = 3
  config.batch = 8
  return resolve(config)


def test_the_small_form_is_one_source_two_targets_and_three_turns(small):
  experiment = build.build(small, devices=1)
  assert tuple(experiment.stages) == STAGES
  assert experiment.roles['open'] == ('mnist_30', 'mnist_60', 'mnist_90')
  assert {one.image_shape for one in experiment.domains.values()} == {(28, 28, 3)}
  stage = experiment.last
  target = stage.images['target/train']
  assert isinstance(target, Unlabelled) and len(target.rows) == 60
  plain, turned = (
    experiment.domains[name].tests['test'].source.images
    for name in ('mnist', 'mnist_90')
  )
  np.testing.assert_array_equal(turned, np.rot90(plain, axes=(1, 2)))
  for one in experiment.stages.values():
    state = train.state_shapes(one.method, one.streams)
    assert state.params['net']['head']
  # An epoch of the curriculum is one of the stage, whatever the number of images.
  left = stage.reads['target']
  assert left.ordered_by == 'target/train/distance' and left.stage == 'domain_factor'
  distance = np.arange(60)[::-1].astype(np.float32)
  stream = left.into(stage.streams['target'], {left.ordered_by: distance}, None)
  place = {row: at for at, row in enumerate(target.rows + target.offset)}
  seen = [place[row] for step in range(7) for row in stream.payload(step)['index']]
  assert min(seen) >= 30  # the nearer half
  later = [place[row] for step in range(7, 15) for row in stream.payload(step)['index']]
  assert min(later) < 30


@pytest.mark.parametrize(
  ('recipe', 'form', 'rates'),
  [
    ('ocda', 'paper', (1e-3, 1e-5, 1e-3, 1e-4)),
    ('ocda_released', 'released', (1e-3, 1e-5, 1e-3, 1e-4)),
  ],
)
def test_rates_and_fusions(recipe, form, rates):
  config = resolve(c_digits_small.get_config(recipe))
  stages = {name: stage_config(config, name) for name in STAGES}
  trained = [name for name in STAGES if name != 'centroids']
  for name, rate in zip(trained, rates, strict=True):
    stage = stages[name]
    assert stage['schedule']['base'] == pytest.approx(rate)
    assert stage['optimizer']['name'] == 'adam' and stage['epochs'] == 30
    for player, described in stage['players'].items():
      share = 0.1 if player == 'fusion' else 1.0
      assert described['schedule']['base'] == pytest.approx(share * rate)
  last = stages['scheduled']
  assert last['players']['fusion']['network']['form'] == form
  quirks = recipe == 'ocda_released'
  assert last['streams']['target']['sampler']['in_place'] == quirks
  scale = last['optimizer'].get('learning_rate_scale')
  assert scale == ([['.*', 0.1]] if quirks else None)


def test_lengths_and_rates_of_c_digits_are_those_of_the_code(no_data):
  config = c_digits.get_config('ocda,open=swit')
  config.stages.scheduled.epochs = 50.0  # its schedules end with the stage
  config = resolve(config)
  assert config['open_domains'] == ['swit'] and config['batch'] == 128
  stages = {name: stage_config(config, name) for name in STAGES}
  assert [stages[name]['epochs'] for name in STAGES] == [100, 0, 200, 200, 50]
  last = stages['scheduled']
  owners = (last, *last['players'].values())
  assert {owner['schedule']['end'] for owner in owners} == {50}
  bases = [stages[name]['schedule']['base'] for name in STAGES if name != 'centroids']
  assert bases == [1e-4, 1e-5, 1e-4, 1e-4]
  assert config['data']['n_max'] == 4659


def test_the_network_of_c_digits_has_its_size():
  net = make_classifier('dtn', 'cosine_squash', 10)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), image)
  assert shapes['params']['trunk']['fc1']['kernel'].shape == (256 * 4 * 4, 512)
  count = sum(x.size for x in jax.tree.leaves(shapes['params']))
  convolutions = sum(25 * a * b + 3 * b for a, b in ((3, 64), (64, 128), (128, 256)))
  assert count == convolutions + 4096 * 512 + 3 * 512 + 512 * 10


def write_faces(folder, rng):
  """Writes lists and images for all cameras, two images per class."""
  cameras = (c_faces.SOURCE, *c_faces.COMPOUND, c_faces.OPEN)
  for camera in cameras:
    home = folder / f'mp{camera}'
    home.mkdir()
    for split in ('train', 'test'):
      lines = []
      for label in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4):
        path = f'mp{camera}/{split}_{len(lines)}.png'
        pixels = rng.integers(0, 256, (40, 36, 3), np.uint8)
        Image.fromarray(pixels).save(folder / path)
        lines.append(f'{path} {label}\n')
      (home / f'mp{camera}_{split}.txt').write_text(''.join(lines))


def test_faces_of_six_cameras(tmp_path, rng):
  """On a miniature every stage builds, and streams read its files."""
  write_faces(tmp_path, rng)
  config = c_faces.get_config(f'ocda,lists={tmp_path},images={tmp_path},size=32')
  config.update(batch=4, eval_batch=4)
  config.data.workers = 0
  experiment = build.build(resolve(config), devices=1)
  assert experiment.roles['target'] == ('mp08', 'mp09', 'mp13', 'mp14')
  assert len(experiment.dataset.class_names) == 5
  for stage in experiment.stages.values():
    state = train.state_shapes(stage.method, stage.streams)
    assert state.params['net']['trunk']['stage4_block2']
    images = stage.streams['train'].payload(0)['image']
    assert images.shape == (4, 32, 32, 3)
  decoder = experiment.stages['domain_factor']
  state = train.state_shapes(decoder.method, decoder.streams)
  assert state.params['decoder']['conv5']['kernel'].shape == (3, 3, 16, 3)
  target = decoder.streams['target'].payload(0)
  assert 'label' not in target and target['image'].shape == (4, 32, 32, 3)


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('rotated:npz:x.npz', 'must be degrees and a source'),
    ('rotated:30', 'must be degrees and a source'),
    ('rotated:30:fakes', "unknown source 'fakes'"),
  ],
)
def test_a_source_that_cannot_be_turned(spec, message):
  with pytest.raises(UserError, match=message):
    load_source(spec)


@pytest.mark.slow
def test_real_digits_turn():
  """All of MNIST, from the folder that LT_JAX_DATA names."""
  file = pathlib.Path(os.environ.get('LT_JAX_DATA', '.')) / 'mnist.npz'
  if not file.exists():
    pytest.skip('LT_JAX_DATA names no folder with mnist.npz')
  plain, turned = load_source(f'npz:{file}'), load_source(f'rotated:90:npz:{file}')
  assert isinstance(turned['test'], Arrays)
  images = np.rot90(plain['test'].images, axes=(1, 2))
  np.testing.assert_array_equal(turned['test'].images, images)
  np.testing.assert_array_equal(turned['test'].labels, plain['test'].labels)
