"""Sources: files are read back as written, and bad files give a one-line error."""

import copy
import io
import os
import pathlib
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from lt_jax.data import sources
from lt_jax.data.attributes import class_vectors
from lt_jax.errors import UserError

PIXELS = np.random.default_rng(0)


def archive(**changes):
  """Returns the members of a small valid archive, changed; None removes a member."""
  members = {
    'x_train': PIXELS.integers(0, 256, (6, 4, 5, 3), np.uint8),
    'y_train': np.array([0, 1, 2, 0, 1, 2]),
    'x_test': PIXELS.integers(0, 256, (3, 4, 5, 3), np.uint8),
    'y_test': np.array([2, 1, 0], np.uint8),
    **changes,
  }
  return {key: value for key, value in members.items() if value is not None}


def write_npz(path, **changes):
  members = archive(**changes)
  np.savez(path, **members)
  return members


def test_digits_are_the_bundled_ones():
  from sklearn.datasets import load_digits

  source = sources.load_source('digits')['train']
  data = load_digits()
  assert source.images.shape == (1797, 8, 8, 1)
  assert source.images.dtype == np.uint8
  assert source.images.max() == 255
  assert source.image_shape == (8, 8, 1)
  assert source.class_names == tuple('0123456789')
  for value in range(17):
    grey = source.images[..., 0][data.images == value]
    assert (grey == round(value * 255 / 16)).all()
  np.testing.assert_array_equal(source.labels, data.target)
  with pytest.raises(UserError, match='no argument'):
    sources.load_source('digits:8')


def test_npz_round_trip(tmp_path):
  members = write_npz(
    tmp_path / 'a.npz', class_names=np.array(['a', 'b', 'c']), index=np.arange(3)
  )
  loaded = sources.load_source(f'npz:{tmp_path}/a.npz')
  assert set(loaded) == {'train', 'test'}
  assert sources.passed_over(loaded) == ('train: members passed over: index',)
  for split, source in loaded.items():
    assert len(source) == len(members[f'y_{split}'])
    assert source.image_shape == (4, 5, 3)
    assert source.class_names == ('a', 'b', 'c')
    assert source.labels.dtype == np.int32
    np.testing.assert_array_equal(source.labels, members[f'y_{split}'])
    np.testing.assert_array_equal(source.images, members[f'x_{split}'])
    np.testing.assert_array_equal(source[1], members[f'x_{split}'][1])


def test_npz_of_grey_images_and_without_names(tmp_path):
  grey = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
  np.savez_compressed(
    tmp_path / 'a.npz', x_train=grey, y_train=[0, 2, 1], x_test=grey, y_test=[0, 1, 2]
  )
  source = sources.load_source(f'npz:{tmp_path}/a.npz')['test']
  assert source.image_shape == (2, 2, 1)
  assert source.class_names == ('0', '1', '2')
  np.testing.assert_array_equal(source.images[..., 0], grey)


def test_npz_of_features_and_of_other_splits(tmp_path):
  x = PIXELS.normal(size=(6, 7))
  y = np.arange(6) % 2
  np.savez(tmp_path / 'a.npz', x_a=x, y_a=y, x_b=x[:3], y_b=y[:3], classes=['p', 'q'])
  loaded = sources.load_source(f'npz:{tmp_path}/a.npz')
  assert set(loaded) == {'a', 'b'}
  assert loaded['b'].class_names == ('p', 'q') and sources.passed_over(loaded) == ()
  assert loaded['a'].image_shape == (1, 1, 7) and loaded['a'].dtype == np.float32
  np.testing.assert_array_equal(loaded['a'].images[:, 0, 0], x.astype(np.float32))
  prints = {sources.fingerprint(loaded['a'])}
  x[2, 3] += 1
  np.savez(tmp_path / 'a.npz', x_train=x, y_train=y, x_test=x, y_test=y)
  loaded = sources.load_source(f'npz:{tmp_path}/a.npz')
  assert sources.fingerprint(loaded['train']) not in prints
  for bad in (np.nan, np.inf, 1e300):
    x[4, 1] = bad
    np.savez(tmp_path / 'a.npz', x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(UserError, match='row 4 has values that are not finite'):
      sources.load_source(f'npz:{tmp_path}/a.npz')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'y_test': None}, 'y_test is missing'),
    ({'x_train': np.zeros((6, 4, 5, 3))}, 'x_train is float64, x_test uint8'),
    ({'x_train': np.zeros((6, 4, 5, 3), int)}, 'x_train must be uint8.*int64'),
    ({'x_train': np.zeros((6, 4), np.uint8)}, r'x_train has .*\(4,\), x_test of'),
    ({'x_train': np.zeros(6, np.uint8)}, r'x_train must be.*\(6,\)'),
    ({'x_train': np.zeros((0, 4, 5, 3), np.uint8)}, r'x_train must be.*\(0, 4'),
    ({'x_test': np.zeros((3, 8, 8, 3), np.uint8)}, r'x_train has .*x_test of \(8, 8'),
    ({'y_train': np.zeros(5, int)}, r'y_train must be whole numbers \(6,\)'),
    ({'y_train': np.zeros((6, 1), int)}, r'y_train must be .*\(6, 1\).*ravel'),
    ({'y_train': np.eye(6)}, r'y_train must be .*\(6, 6\); if .* one-hot.*argmax\(1\)'),
    (
      {'x_train': np.zeros((4, 5, 3, 6), np.uint8)},
      r'x_train has the shape \(4, 5, 3, 6\), images last.*transpose\(3, 0, 1, 2\)',
    ),
    ({'y_train': np.zeros(6)}, 'y_train must be whole numbers.*float64'),
    ({'y_train': np.array([0, 1, -1, 0, 1, 2])}, 'y_train: label -1 at index 2'),
    ({'y_train': np.array([0, 1, 2, 255, 1, 2])}, 'y_train: label 255 at index 3'),
    ({'y_test': np.array([0, 3, 1])}, r'y_test: label 3 at index 1 is not in \[0, 3\)'),
    ({'class_names': np.array(['a', 'b'])}, 'y_train: label 2 at index 2'),
    ({'class_names': np.array([1, 2, 3])}, 'class_names must be strings'),
    ({'y_train': np.array([None] * 6)}, 'y_train'),
    (
      {
        key: np.zeros((n, 3, 8, 9), np.uint8)
        for key, n in (('x_train', 6), ('x_test', 3))
      },
      r'x_train has the shape \(6, 3, 8, 9\), channels first.*transpose\(0, 2, 3, 1\)',
    ),
    (
      {
        key: np.zeros((n, 3, 8, 8), np.float32)
        for key, n in (('x_train', 6), ('x_test', 3))
      },
      r'x_train has the shape \(6, 3, 8, 8\), channels first.*transpose\(0, 2, 3, 1\)',
    ),
  ],
)
def test_npz_faults_name_file_and_member(tmp_path, changes, message):
  write_npz(tmp_path / 'bad.npz', **changes)
  with pytest.raises(UserError, match=message) as error:
    sources.load_source(f'npz:{tmp_path}/bad.npz')
  assert 'bad.npz' in str(error.value)
  assert '\n' not in str(error.value)


def test_npz_headers_are_checked_before_anything_is_read(tmp_path):
  write_npz(tmp_path / 'a.npz', x_test=None, x_train=None)
  header = io.BytesIO()
  claim = {'descr': '|u1', 'fortran_order': False, 'shape': (2**40, 4, 4, 3)}
  np.lib.format.write_array_header_1_0(header, claim)
  with zipfile.ZipFile(tmp_path / 'a.npz', 'a') as file:
    file.writestr('x_train.npy', header.getvalue())
    file.writestr('x_test.npy', header.getvalue())
  with pytest.raises(UserError, match=r'x_train should be .* bytes but has'):
    sources.load_source(f'npz:{tmp_path}/a.npz')
  bomb = np.zeros((2**13, 32, 32, 3), np.uint8)
  np.savez_compressed(tmp_path / 'b.npz', **archive(x_train=bomb))
  with pytest.raises(UserError, match='x_train unpacks to'):
    sources.load_source(f'npz:{tmp_path}/b.npz')


def test_npz_of_which_a_bit_changed(tmp_path):
  file = tmp_path / 'a.npz'
  write_npz(file, x_train=np.zeros((6, 64, 64, 3), np.uint8))
  whole = file.read_bytes()
  for good, bad in (
    (b'v\0{', b'6\0{'),  # a header that ends too early
    (b'PK\1\2\x2d\3\x2d', b'PK\1\2\x2d\3\x6d'),  # from a later version of ZIP
  ):
    assert good in whole
    file.write_bytes(whole.replace(good, bad, 1))
    with pytest.raises(UserError, match=f'npz:{file}: ') as error:
      sources.load_source(f'npz:{file}')
    assert '\n' not in str(error.value)


def test_a_file_that_is_not_npz(tmp_path):
  (tmp_path / 'text.npz').write_text('x')
  write_npz(tmp_path / 'cut.npz')
  whole = (tmp_path / 'cut.npz').read_bytes()
  (tmp_path / 'cut.npz').write_bytes(whole[: len(whole) // 2])
  (tmp_path / 'bit.npz').write_bytes(whole.replace(whole[300:310], b'0123456789', 1))
  for name in ('text', 'cut', 'bit', 'absent'):
    with pytest.raises(UserError, match=f'npz:.*{name}.npz') as error:
      sources.load_source(f'npz:{tmp_path}/{name}.npz')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('spec', ['', 'npy:a', 'C:/data', 'digit'])
def test_unknown_sources(spec):
  with pytest.raises(UserError, match='unknown source'):
    sources.load_source(spec)


def test_generated_sources_take_no_argument():
  with pytest.raises(UserError, match=r"'fake' takes no argument, got '5': data.fake"):
    sources.load_source('fake:5')


def encode(pixels, mode, kind):
  file = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(file, kind)
  return file.getvalue()


def write_tfds(folder, name, shape, examples, **more):
  """Writes a data set like TFDS, with ArrayRecord shards and without TensorFlow."""
  import tensorflow_datasets as tfds

  folder = folder / name / '1.0.0'
  folder.mkdir(parents=True)
  features = {
    'id': tfds.features.Text(),
    'image': tfds.features.Image(shape=shape),
    'label': tfds.features.ClassLabel(names=['cat', 'dog']),
    **more,
  }
  features = {key: feature for key, feature in features.items() if feature}
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=name, version='1.0.0', data_dir=str(folder), module_name='tests'
  )
  info = tfds.core.DatasetInfo(
    builder=identity, features=tfds.features.FeaturesDict(features)
  )
  writer = tfds.core.SequentialWriter(
    info, max_examples_per_shard=3, file_format='array_record'
  )
  writer.initialize_splits(list(examples))
  writer.add_examples(examples)
  writer.close_all()


def small_tfds(folder):
  """Writes a set with seven training and two test images of the same size."""
  pixels = PIXELS.integers(0, 256, (9, 4, 5, 3), np.uint8)
  examples = [
    {'id': str(i), 'image': encode(image, 'RGB', 'png'), 'label': i % 2}
    for i, image in enumerate(pixels)
  ]
  splits = {'train': examples[:7], 'test': examples[7:]}
  write_tfds(folder, 'small_set', (4, 5, 3), splits)
  return pixels


def test_tfds_with_one_image_size_is_read_into_memory(tmp_path):
  pixels = small_tfds(tmp_path)
  loaded = sources.load_source('tfds:small_set', data_dir=str(tmp_path))
  assert set(loaded) == {'train', 'test'}
  np.testing.assert_array_equal(loaded['train'].images, pixels[:7])
  np.testing.assert_array_equal(loaded['test'].images, pixels[7:])
  assert loaded['train'].labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
  assert loaded['train'].class_names == ('cat', 'dog')


def test_numbered_classes_are_named_by_their_records(tmp_path):
  """As in caltech_birds2011, so that descriptions can be matched by name."""
  import tensorflow_datasets as tfds

  birds = {1: 'sooty_albatross', 2: 'indigo_bunting', 0: 'ovenbird'}
  image = encode(np.zeros((4, 5), np.uint8), 'RGB', 'png')
  examples = [
    {'id': '', 'image': image, 'label': c, 'label_name': name}
    for c, name in birds.items()
  ]
  write_tfds(
    tmp_path,
    'birds',
    (None, None, 3),
    {'train': examples[:2] * 2, 'test': examples[1:]},
    label=tfds.features.ClassLabel(num_classes=4),
    label_name=tfds.features.Text(),
  )
  loaded = sources.load_source('tfds:birds', str(tmp_path))
  names = ('ovenbird', 'sooty_albatross', 'indigo_bunting', '3')
  assert {one.class_names for one in loaded.values()} == {names}
  assert loaded['test'].labels.tolist() == [2, 0]
  described = ('014.Indigo_Bunting', '003.Sooty_Albatross', '167.Ovenbird')
  np.savez(tmp_path / 'cub.npz', class_vectors=np.eye(3), class_names=described)
  found = class_vectors([str(tmp_path / 'cub.npz')], names[:3])
  np.testing.assert_array_equal(found.vectors, np.eye(3)[[2, 1, 0]])


def test_a_large_tfds_stays_on_disk(tmp_path, monkeypatch):
  pixels = small_tfds(tmp_path)
  monkeypatch.setattr(sources, 'MEMORY_LIMIT', 2 * 4 * 5 * 3)
  loaded = sources.load_source('tfds:small_set', data_dir=str(tmp_path))
  assert hasattr(loaded['test'], 'images')
  source = loaded['train']
  assert not hasattr(source, 'images')
  assert len(source) == 7
  for i in (5, 0, 6):
    np.testing.assert_array_equal(source[i], pixels[i])
  assert source.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
  assert source.labels.dtype == np.int32
  twin = copy.deepcopy(source)  # with the protocol that sends it to a worker
  np.testing.assert_array_equal(twin[3], pixels[3])


def test_tfds_images_of_every_colour_model_and_size(tmp_path):
  grey = np.full((6, 4), 100, np.uint8)
  images = [
    encode(grey, 'L', 'jpeg'),
    encode(grey, 'CMYK', 'jpeg'),
    encode(grey[:3], 'RGB', 'png'),
    b'no image',
  ]
  examples = [{'id': '', 'image': image, 'label': 0} for image in images]
  write_tfds(tmp_path, 'mixed_set', (None, None, 3), {'train': examples})
  source = sources.load_source('tfds:mixed_set', data_dir=str(tmp_path))['train']
  assert source.image_shape == (None, None, 3)
  assert source.example(0) == (images[0], 0)
  for i, height in enumerate((6, 6, 3)):
    assert source[i].shape == (height, 4, 3)
    assert np.abs(source[i].astype(int) - 100).max() <= 2
  with pytest.raises(UserError, match=r'mixed_set/1.0.0/train: image 3'):
    source[3]


def test_stored_labels_spare_the_reading(tmp_path, monkeypatch):
  examples = [
    {
      'id': '',
      'image': encode(np.zeros((i + 1, 2), np.uint8), 'RGB', 'png'),
      'label': label,
    }
    for i, label in enumerate([1, 0, 1, -1])
  ]
  splits = {'train': examples[:3], 'test': examples[3:]}
  write_tfds(tmp_path, 'large_set', (None, None, 3), splits)

  def load():
    return sources.load_source('tfds:large_set', data_dir=str(tmp_path))

  sources.store_labels(load())
  monkeypatch.setattr(sources.Records, 'read_labels', None)
  loaded = load()
  assert loaded['train'].labels.tolist() == [1, 0, 1]
  with pytest.raises(UserError, match=r'large_set/1.0.0/test: label -1 at index 0'):
    _ = loaded['test'].labels


def test_tfds_faults(tmp_path):
  import tensorflow_datasets as tfds

  write_tfds(tmp_path, 'no_label', (None, None, 3), {'train': []}, label=None)
  write_tfds(
    tmp_path,
    'deep',
    (None, None, 1),
    {'train': []},
    image=tfds.features.Image(shape=(None, None, 1), dtype=np.uint16),
  )
  small_tfds(tmp_path)
  info = tmp_path / 'small_set' / '1.0.0' / 'dataset_info.json'
  info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
  for name, message in {
    'cifar10': r'run: python -m lt_jax.prepare cifar10 --data_dir=\S+$',
    'cifar_10': "unknown TFDS data set 'cifar_10'; did you mean 'cifar10'",
    'nothing_like_it': "unknown TFDS data set 'nothing_like_it'$",
    'a b': 'a b',
    'no_label': "needs the features 'image'.*'label'.*but has id, image$",
    'deep': "needs the features 'image'",
    'small_set': 'as tfrecord, which has no random access',
  }.items():
    with pytest.raises(UserError, match=message) as error:
      sources.load_source(f'tfds:{name}', data_dir=str(tmp_path))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('file', 'kept', 'message'),
  [
    ('features.json', None, 'features.json cannot be read: No such file'),
    ('features.json', 0.5, 'features.json is not valid JSON'),
    ('dataset_info.json', None, 'dataset_info.json cannot be read: No such file'),
    ('dataset_info.json', 0.5, 'dataset_info.json is not valid JSON'),
    ('lt_jax-labels-train.npy', 0.5, 'lt_jax-labels-train.npy is damaged; delete it'),
    ('lt_jax-labels-train.npy', 0, 'lt_jax-labels-train.npy is damaged; delete it'),
  ],
)
def test_a_set_that_was_copied_in_part(tmp_path, file, kept, message):
  image = encode(np.zeros((4, 5), np.uint8), 'RGB', 'png')
  examples = {'train': [{'id': '', 'image': image, 'label': 1}] * 3}
  write_tfds(tmp_path, 'pets', (None, None, 3), examples)
  sources.store_labels(sources.load_source('tfds:pets', str(tmp_path)))
  path = tmp_path / 'pets' / '1.0.0' / file
  if kept is None:
    path.unlink()
  else:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
  with pytest.raises(UserError, match=f'{path.parent}/{message}') as error:
    _ = sources.load_source('tfds:pets', str(tmp_path))['train'].labels
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('good', 'bad'),
  [
    (b'v\0{', b'6\0{'),  # a header that ends too early
    (b'<i8', b',i8'),
    (b'<i8', b'<m8'),  # durations
    (b'(3,), }' + b' ' * 15, b'(%d,), }' % 10**15),
  ],
)
def test_labels_with_a_damaged_header(tmp_path, good, bad):
  file = tmp_path / 'labels.npy'
  np.save(file, np.array([0, 1, 1]))
  whole = file.read_bytes()
  assert good in whole
  file.write_bytes(whole.replace(good, bad, 1))
  source = sources.Records('tfds:pets', 1, '123', ('a', 'b'), (None, None, 3), file)
  with pytest.raises(UserError, match=f'{file} is damaged; delete it: ') as error:
    _ = source.labels
  assert '\n' not in str(error.value)


def test_a_known_set_that_was_copied_in_part(tmp_path):
  home = tmp_path / 'cifar10' / '3.0.2'
  home.mkdir(parents=True)
  (home / 'features.json').write_text('{}')
  with pytest.raises(UserError, match=f'{home}/dataset_info.json cannot be read'):
    sources.load_source('tfds:cifar10', str(tmp_path))


def test_fingerprint_sees_every_change_of_what_is_trained_on():
  members = archive()
  base = sources.Arrays(members['x_train'], members['y_train'], ('a', 'b', 'c'))
  rows = np.array([0, 2, 5])
  reference = sources.fingerprint(base, rows)
  assert len(reference) == 64
  assert reference == sources.fingerprint(base, rows.astype(np.int32))

  def changed(key, position):
    images, labels = base.images.copy(), base.labels.copy()
    {'image': images, 'label': labels}[key][position] ^= 1
    return sources.fingerprint(sources.Arrays(images, labels, base.class_names), rows)

  assert changed('image', (2, 1, 1, 1)) != reference
  assert changed('label', 5) != reference
  assert changed('image', 1) == reference
  others = [
    sources.fingerprint(base),
    sources.fingerprint(base, rows[::-1]),
    sources.fingerprint(base, rows[:2], rows[2:]),
    sources.fingerprint(base, rows[:1], rows[1:]),
    sources.fingerprint(sources.Arrays(base.images, base.labels, tuple('abd')), rows),
  ]
  assert len({reference, *others}) == 6
  assert sources.fingerprint(base) == sources.fingerprint(base, np.arange(6))


def test_fingerprint_of_a_source_on_disk(tmp_path, monkeypatch):
  small_tfds(tmp_path)
  monkeypatch.setattr(sources, 'MEMORY_LIMIT', 0)
  first, again = (
    sources.load_source('tfds:small_set', data_dir=str(tmp_path)) for _ in range(2)
  )
  rows = np.array([0, 1])
  prints = [sources.fingerprint(s['train'], rows) for s in (first, again)]
  assert prints[0] == prints[1]
  assert prints[0] != sources.fingerprint(first['test'], rows)


def test_a_set_that_was_prepared_anew_has_another_fingerprint(tmp_path):
  prints = []
  for side in (4, 5):
    pixels = PIXELS.integers(0, 256, (side, 4), np.uint8)
    image = encode(pixels, 'L', 'png')
    examples = [{'id': '', 'image': image, 'label': 0}]
    write_tfds(tmp_path / str(side), 'pets', (None, None, 3), {'train': examples})
    loaded = sources.load_source('tfds:pets', data_dir=str(tmp_path / str(side)))
    prints.append(sources.fingerprint(loaded['train']))
  assert prints[0] != prints[1]


def test_a_damaged_record_is_named(tmp_path):
  pixels = PIXELS.integers(0, 256, (20, 20), np.uint8)  # which is not compressible
  examples = [{'id': '', 'image': encode(pixels, 'L', 'png'), 'label': 0}] * 3
  write_tfds(tmp_path, 'pets', (None, None, 3), {'train': examples})
  (shard,) = (tmp_path / 'pets' / '1.0.0').glob('*.array_record*')
  data = bytearray(shard.read_bytes())
  middle = len(data) // 2
  data[middle : middle + 64] = bytes(64)
  shard.write_bytes(data)
  source = sources.load_source('tfds:pets', data_dir=str(tmp_path))['train']
  with pytest.raises(
    UserError, match=r'train: image \d: a record that cannot be read: '
  ) as error:
    for position in range(3):
      source.example(position)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('message', 'kind'),
  [
    ('Corrupted Riegeli/records file: block header hash mismatch', UserError),
    ('Invalid Riegeli/records file: chunk boundary is 393216 but', UserError),
    ('ArrayRecord file should be at least 64KB big', UserError),
    ('', UserError),  # for a shard that ends with a block
    ('open() failed: No such file or directory; opening FILE', UserError),
    ('pread() failed: Input/output error; reading Corrupted; at byte 9', OSError),
    ('open() failed: Stale file handle; opening FILE', OSError),
    ('open() failed: Too many open files; opening FILE', OSError),
    ('PerformWork() - CURL error [6]=Could not resolve hostname', OSError),
  ],
)
def test_only_damage_is_a_bad_record(message, kind):
  class Shard:
    def __getitem__(self, position):
      raise RuntimeError(message)

  source = sources.Records('tfds:pets', 1, Shard(), ('cat',), (None, None, 3), None)
  with pytest.raises(kind, match='^tfds:pets: image 7: .*' + re.escape(message)):
    source.encoded(7)


def test_a_disk_that_fails_is_no_damage(tmp_path):
  pixels = PIXELS.integers(0, 256, (200, 200), np.uint8)
  examples = [{'id': '', 'image': encode(pixels, 'L', 'png'), 'label': 0}] * 3
  write_tfds(tmp_path, 'pets', (None, None, 3), {'train': examples})
  source = sources.load_source('tfds:pets', data_dir=str(tmp_path))['train']
  source.encoded(0)
  (shard,) = (tmp_path / 'pets' / '1.0.0').glob('*.array_record*')
  opened = [n for n in os.listdir('/proc/self/fd') if _target(n) == str(shard)]
  with open('/proc/self/mem', 'rb') as failing:  # with EIO on its first page
    for number in opened:
      os.dup2(failing.fileno(), int(number))
  with pytest.raises(OSError, match='image 1: .*Input/output error'):
    source.encoded(1)


def _target(number):
  try:
    return os.readlink(f'/proc/self/fd/{number}')
  except FileNotFoundError:  # the error of listing them
    return ''


@pytest.mark.parametrize(('name', 'n'), [('cifar10', 20521), ('cifar100', 20563)])
def test_cifar_archives(name, n):
  file = pathlib.Path(os.environ.get('LT_JAX_DATA', '.')) / f'{name}.npz'
  if not file.exists():
    pytest.skip(f'LT_JAX_DATA names no folder with {name}.npz')
  loaded = sources.load_source(f'npz:{file}')
  assert len(loaded['train']) == n
  assert len(loaded['test']) == 10000
  assert loaded['train'].image_shape == (32, 32, 3)
  counts = np.bincount(loaded['test'].labels)
  assert (counts == 10000 // len(loaded['test'].class_names)).all()
