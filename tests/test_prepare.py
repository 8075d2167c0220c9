"""Preparing records from lists and folders: the same images, or smaller ones."""

import errno
import io
import sys
import types

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from lt_jax import prepare
from lt_jax.data import sources
from lt_jax.data.sources import load_source
from lt_jax.errors import UserError
from tests import mini
from tests.test_sources import small_tfds


@pytest.fixture(scope='module')
def lists(tmp_path_factory):
  rng = np.random.default_rng(0)
  return mini.write_lists(tmp_path_factory.mktemp('lists'), rng)


def test_lists_become_the_same_records(lists, tmp_path):
  folder, root = map(str, lists)
  counts = prepare.convert(
    f'list:{folder}', name='mini_lt', data_dir=str(tmp_path), images=root
  )
  assert counts == {'train': 1015, 'val': 8, 'test': 8, 'open': 4}
  before = load_source(f'list:{folder}', root)
  after = load_source('tfds:mini_lt', str(tmp_path))
  assert before.keys() == after.keys()
  for split in before:
    np.testing.assert_array_equal(before[split].labels, after[split].labels)
    for i in (0, len(before[split]) - 1):
      assert before[split].encoded(i) == after[split].encoded(i)
  home = tmp_path / 'mini_lt' / prepare.VERSION
  assert (home / 'lt_jax-labels-train.npy').exists()
  assert not home.with_name(f'{prepare.VERSION}.unfinished').exists()


def test_folders_become_smaller_records(rng, tmp_path):
  for name in ('cat', 'dog'):
    (tmp_path / 'images' / name).mkdir(parents=True)
    for i, size in enumerate([(90, 60), (30, 20)]):
      pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
      Image.fromarray(pixels).save(tmp_path / 'images' / name / f'{i}.png')
  source, data_dir = f'folder:{tmp_path / "images"}', str(tmp_path / 'records')
  prepare.convert(source, name='pets', data_dir=data_dir, short_side=40)
  train = load_source('tfds:pets', data_dir)['train']
  assert train.class_names == ('cat', 'dog')
  sizes = [Image.open(io.BytesIO(train.encoded(i))).size for i in range(4)]
  assert sizes == [(60, 40), (30, 20)] * 2
  whole = load_source(source)['train']
  assert train.encoded(1) == whole.encoded(1)  # the smaller one is not touched


def test_a_prepared_set_becomes_a_smaller_one(rng, tmp_path):
  def rows(*labels):
    kind = {'supercategory': -1, 'id': ''}
    return [{'image': mini.photograph(rng, 0), 'label': y, **kind} for y in labels]

  splits = {'train': rows(5, 8141, 0), 'validation': rows(7), 'test': rows(-1)}
  data_dir = str(mini.write_records(tmp_path, 'i_naturalist2018', splits))
  source, options = 'tfds:i_naturalist2018', {'data_dir': data_dir, 'short_side': 32}
  prepare.convert(source, name='inat18_32', **options)
  before, after = (load_source(s, data_dir) for s in (source, 'tfds:inat18_32'))
  assert before.keys() == after.keys() == {'train', 'val', 'test'}
  assert before['train'].class_names == after['train'].class_names
  assert after['train'].labels.tolist() == [5, 8141, 0]
  assert min(Image.open(io.BytesIO(after['train'].encoded(0))).size) == 32
  assert after['test'].example(0)[1] == -1  # unlabelled, and so it stays


def test_invalid_sources_of_records(tmp_path):
  small_tfds(tmp_path)
  for source, message in {
    'tfds:small_set': r'tfds:small_set has images of shape \(4, 5, 3\); only',
    'npz:x.npz': "'npz:x.npz' is not list:FOLDER, folder:DIR or tfds:NAME",
  }.items():
    with pytest.raises(UserError, match=message):
      prepare.convert(source, name='smaller', data_dir=str(tmp_path))


def test_a_path_is_no_source(tmp_path):
  with pytest.raises(UserError, match=f'write folder:{tmp_path} for a folder a class'):
    prepare.main(str(tmp_path))
  with pytest.raises(UserError, match=f'write folder:{tmp_path}, list:{tmp_path} or'):
    load_source(str(tmp_path))


def test_options_that_make_no_sense(lists, tmp_path):
  folder, root = map(str, lists)
  options = {'name': 'mini_lt', 'data_dir': str(tmp_path), 'images': root}
  for source, changed, message in (
    (f'list:{folder}', {'short_side': -5}, '--short_side is -5; it must be 0 or more'),
    (f'folder:{root}', {}, '--images is for list:FOLDER, not for folder:'),
    (f'list:{folder}', {'data_dir': '/proc/no'}, 'cannot be written: No such file'),
  ):
    with pytest.raises(UserError, match=message):
      prepare.convert(source, **{**options, **changed})


def test_an_unknown_set_is_reported_in_a_line(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow', types.ModuleType('tensorflow'))
  with pytest.raises(UserError, match="unknown TFDS data set 'cifar_10'; did you mean"):
    prepare.download('cifar_10')


def test_an_interrupted_stage_starts_again(lists, tmp_path, monkeypatch):
  folder, root = map(str, lists)
  options = {'name': 'mini_lt', 'data_dir': str(tmp_path), 'images': root}
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(prepare, '_rows', interrupted)
    prepare.convert(f'list:{folder}', **options)
  left = tmp_path / 'mini_lt' / f'{prepare.VERSION}.unfinished'
  with pytest.raises(UserError, match=f'{left} is not finished; run .*prepare again'):
    load_source('tfds:mini_lt', str(tmp_path))
  prepare.convert(f'list:{folder}', **options)
  with pytest.raises(UserError, match='already exists; give another --name'):
    prepare.convert(f'list:{folder}', **options)


def interrupted(*args):
  raise KeyboardInterrupt


def test_a_set_is_prepared_by_one_at_a_time(lists, tmp_path, monkeypatch):
  folder, root = map(str, lists)
  options = {'name': 'mini_lt', 'data_dir': str(tmp_path), 'images': root}
  rows = prepare._rows

  def meanwhile(*args):
    monkeypatch.setattr(prepare, '_rows', rows)
    with pytest.raises(UserError, match=r'mini_lt is in use by process \d+'):
      prepare.convert(f'list:{folder}', **options)
    yield from rows(*args)

  monkeypatch.setattr(prepare, '_rows', meanwhile)
  counts = prepare.convert(f'list:{folder}', **options)
  after = load_source('tfds:mini_lt', str(tmp_path))
  assert {split: len(one) for split, one in after.items()} == counts
  assert len(after['train'].encoded(counts['train'] - 1)) > 0


def test_a_full_disk_can_pass(lists, tmp_path, monkeypatch):
  folder, root = map(str, lists)
  options = {'name': 'mini_lt', 'data_dir': str(tmp_path), 'images': root}

  class Full(array_record_module.ArrayRecordWriter):
    def close(self):
      raise RuntimeError('write() failed: No space left on device; writing FILE')

  with monkeypatch.context() as patch:
    patch.setattr(array_record_module, 'ArrayRecordWriter', Full)
    with pytest.raises(OSError, match='No space left on device; writing FILE'):
      prepare.convert(f'list:{folder}', **options)
  assert prepare.convert(f'list:{folder}', **options)['train'] == 1015


@pytest.mark.slow
def test_a_disk_that_labels_fill_can_pass(lists, tmp_path, monkeypatch):
  folder, root = map(str, lists)
  options = {'name': 'mini_lt', 'data_dir': str(tmp_path), 'images': root}
  write = sources.write_atomically

  def full(path, data):
    if path.name == 'lt_jax-labels-val.npy':
      raise OSError(errno.ENOSPC, 'No space left on device')
    write(path, data)

  with monkeypatch.context() as patch:
    patch.setattr(sources, 'write_atomically', full)
    with pytest.raises(OSError, match='No space left on device'):
      prepare.convert(f'list:{folder}', **options)
  with monkeypatch.context() as patch:  # they are known, and not read once more
    patch.setattr(sources.Records, 'read_labels', None)
    counts = prepare.convert(f'list:{folder}', **options)
  for split, source in load_source('tfds:mini_lt', str(tmp_path)).items():
    stored = np.load(source.labels_file)
    assert stored.dtype == np.int64
    assert len(stored) == counts[split]
    np.testing.assert_array_equal(stored, source.read_labels())


def test_the_tree_is_looked_at_before_the_name(tmp_path):
  for name in ('train/cat', 'valid/cat'):
    (tmp_path / name).mkdir(parents=True)
  for name in ('', 'My Set'):
    with pytest.raises(UserError, match="valid looks like the split 'val'"):
      prepare.convert(f'folder:{tmp_path}', name=name)


@pytest.mark.parametrize('name', ['places-lt', 'Places', '', '../x'])
def test_names_that_tfds_does_not_take(lists, tmp_path, name):
  options = {'data_dir': str(tmp_path), 'images': lists[1]}
  with pytest.raises(UserError, match='--name is .*like places_lt|such as places_lt'):
    prepare.convert(f'list:{lists[0]}', name=name, **options)


@pytest.mark.parametrize('short_side', [0, 40])
@pytest.mark.parametrize(
  ('encoded', 'message'), [(b'', 'the file is empty'), (b'x', 'not an image')]
)
def test_a_damaged_image_is_named(rng, tmp_path, short_side, encoded, message):
  images = tmp_path / 'images'
  for name in ('cat', 'dog'):
    (images / name).mkdir(parents=True)
    (images / name / 'whole.jpg').write_bytes(mini.photograph(rng, 0))
  damaged = images / 'dog' / 'damaged.jpg'
  damaged.write_bytes(encoded)
  options = {'name': 'pets', 'data_dir': str(tmp_path), 'short_side': short_side}
  with pytest.raises(UserError, match=f'{damaged}: {message}'):
    prepare.convert(f'folder:{images}', **options)
  damaged.unlink()
  assert prepare.convert(f'folder:{images}', **options) == {'train': 2}
