"""Class descriptions from files, rejected files, and which classes are unseen."""

import numpy as np
import pytest
from scipy import io

from lt_jax.data.attributes import (
  EMBEDDED,
  chosen_classes,
  class_vectors,
  filled,
  read_descriptions,
  unit_rows,
  words_of,
)
from lt_jax.data.dataset import load_dataset
from lt_jax.data.features import make_split
from lt_jax.data.mat import read_mat
from lt_jax.data.sources import load_source
from lt_jax.errors import UserError
from tests import mini_zsl

NAMES = ('zebra', 'polar+bear', 'blue_whale')
VECTORS = np.array([[1.0, 0.0, 2.0, 1.0], [0.0, 1.0, 2.0, 3.0], [2.0, 2.0, 0.0, 1.0]])


def write_csv(path, names=NAMES, vectors=VECTORS):
  rows = [
    ','.join([name, *map(str, row)]) for name, row in zip(names, vectors, strict=True)
  ]
  path.write_text('\n'.join(['class,a,b,c,d', *rows]))
  return str(path)


def test_the_four_formats_say_the_same(tmp_path):
  turned = [2, 0, 1]
  np.savez(
    tmp_path / 'a.npz',
    class_vectors=VECTORS[turned],
    class_names=np.array(NAMES)[turned],
  )
  io.savemat(
    tmp_path / 'a.mat',
    {'att': VECTORS.T, 'allclasses_names': mini_zsl.cells(NAMES)},
  )
  files = [write_csv(tmp_path / 'a.csv'), f'{tmp_path}/a.npz', f'{tmp_path}/a.mat']
  for file in files:
    np.testing.assert_array_equal(class_vectors([file], NAMES).vectors, VECTORS)
  assert class_vectors(files[:1], NAMES).columns == ('a', 'b', 'c', 'd')
  # Blocks have the same weight, whatever their size.
  both = class_vectors(files[:2], NAMES).vectors
  expected = VECTORS / np.sqrt((VECTORS**2).sum(1, keepdims=True))
  np.testing.assert_allclose(both, np.hstack([expected, expected]), rtol=1e-15)
  # Other spellings of the same words.
  spelt = class_vectors(files[:1], ('Zebra', '07.Polar_Bear', 'blue-whale')).vectors
  np.testing.assert_array_equal(spelt, VECTORS)


@pytest.mark.parametrize('first', ['', '5 2\n'], ids=['glove', 'word2vec'])
def test_word_vectors_are_averaged_over_the_words_of_a_name(tmp_path, first):
  path = tmp_path / 'words.txt'
  path.write_text(first + 'Bear 1 3\nbear 9 0\npolar 3 1\nwhale 0 2\nblue 6 0\n')
  found = class_vectors([str(path)], NAMES[1:]).vectors
  half = np.sqrt(0.5)
  expected = [[half, half], [3 / np.sqrt(10), 1 / np.sqrt(10)]]
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  with pytest.raises(UserError, match=r'no vector of 2 words of class names: emu, ze'):
    class_vectors([str(path)], ('zebra', 'blue+emu'))
  with pytest.raises(UserError, match=r"the class name '\+' has no words"):
    class_vectors([str(path)], ('blue', '+'))


def test_digits_have_ten_codes():
  codes = EMBEDDED['seven_segments'].vectors
  assert codes.shape == (10, 7) and len(np.unique(codes, axis=0)) == 10
  assert codes.sum(1).tolist() == [6, 2, 5, 5, 4, 5, 6, 3, 7, 6]


def test_missing_attributes_take_the_mean_of_the_others():
  found = filled(np.array([[-1.0, 2.0], [3.0, 4.0], [5.0, -1.0]]))
  np.testing.assert_array_equal(found, [[4, 2], [3, 4], [5, 3]])
  signed = np.array([[-1.0, 2.0], [-0.5, 4.0]])
  np.testing.assert_array_equal(filled(signed), signed)
  signs = np.array([[-1.0, 1.0], [1.0, -1.0]])
  np.testing.assert_array_equal(filled(signs), signs)


def npz(path, **arrays):
  np.savez(path, **arrays)
  return str(path)


def bad(tmp_path, **changes):
  return npz(tmp_path / 'bad.npz', **({'class_vectors': VECTORS} | changes))


def transposed(path):
  rows = [('', *NAMES), *((f'a{m}', *row) for m, row in enumerate(VECTORS.T.tolist()))]
  path.write_text('\n'.join(','.join(map(str, row)) for row in rows))
  return str(path)


WRONG = {
  'missing class': (
    lambda p: write_csv(p / 'w.csv', NAMES[:2], VECTORS[:2]),
    r"no description of class 2 \('blue_whale'\)",
  ),
  'same': (
    lambda p: bad(p, class_vectors=VECTORS[[0, 1, 0]]),
    r"class 0 \('zebra'\) and class 2 .* same description",
  ),
  'transposed': (
    lambda p: bad(p, class_vectors=VECTORS.T),
    'are 4 x 3, but there are 3 classes; they seem to be transposed',
  ),
  'transposed table': (
    lambda p: transposed(p / 't.csv'),
    'the classes are columns, so it seems to be transposed',
  ),
  'nan': (
    lambda p: bad(p, class_vectors=VECTORS + np.where(np.eye(3, 4, 1) > 0, np.nan, 0)),
    "attribute 1 of 'zebra' is nan",
  ),
  'no file': (lambda p: f'{p}/none.csv', 'there is no file'),
  'twice': (
    lambda p: write_csv(p / 'w.csv', (*NAMES, 'zebra'), VECTORS[[0, 1, 2, 0]]),
    r"several descriptions of class 0 \('zebra'\): 'zebra', 'zebra'",
  ),
  'two spellings': (
    lambda p: write_csv(p / 'w.csv', ('zebra', 'Polar Bear', 'polar_bear'), VECTORS),
    r"several descriptions of class 1 \('polar\+bear'\): 'Polar Bear', 'polar_bear'",
  ),
  'ending': (lambda p: f'{p}/none.xls', r'end in \.npz, \.csv, \.mat'),
  'objects': (
    lambda p: bad(p, class_vectors=np.array([None, 1], object)),
    'Object arrays cannot be loaded|pickle',
  ),
  'text': (lambda p: write_csv(p / 'w.csv', NAMES, [['x', 1], [1, 2], [2, 3]]), "'x'"),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_descriptions_are_one_line(tmp_path, name):
  make, message = WRONG[name]
  with pytest.raises(UserError, match=message) as error:
    class_vectors([make(tmp_path)], NAMES)
  assert '\n' not in str(error.value)


def test_a_file_for_new_classes_must_name_them(tmp_path):
  described = read_descriptions([write_csv(tmp_path / 'new.csv')])
  assert described.names == NAMES
  np.testing.assert_array_equal(described.vectors, VECTORS)
  with pytest.raises(UserError, match='does not name its classes'):
    read_descriptions([bad(tmp_path)])


# Which classes.


def test_classes_are_chosen_by_name_file_or_number(tmp_path):
  among = np.array([True, True, True, False])
  names = ('a', 'b+c', '2', 'open')
  with pytest.raises(UserError, match=r"'A b' can be class 0 \('a-b'\) or class 1"):
    chosen_classes('unseen', ['A b'], ('a-b', 'a_b', 'c'), among[:3], 0)
  assert chosen_classes('unseen', ['B_c'], names, among, 0).tolist() == [0, 1, 0, 0]
  (tmp_path / 'list.txt').write_text('a\n2\n')
  found = chosen_classes('unseen', [f'@{tmp_path}/list.txt'], names, among, 0)
  assert found.tolist() == [1, 0, 1, 0]
  drawn = [chosen_classes('unseen', [2], names, among, seed) for seed in range(20)]
  assert all(mask.sum() == 2 and not mask[3] for mask in drawn)
  assert len({mask.tobytes() for mask in drawn}) == 3
  for given, message in (
    (['d'], "no class 'd'"),
    (['open'], 'is unseen, or has no images'),
    ([3], 'asks for 3 of 3'),
    (['a', 'b+c', '2'], 'names every class'),
    ('a', 'must be a list'),
    ([1, 'a'], 'must be names, or one number'),
  ):
    with pytest.raises(UserError, match=message):
      chosen_classes('unseen', given, names, among, 0)


def test_words_of_names():
  assert words_of('002.Laysan_Albatross') == ('laysan', 'albatross')
  assert words_of('persian+cat') == ('persian', 'cat') and words_of('7') == ('7',)
  # Numbers can be all that tells names apart.
  assert words_of('747-400') == ('747', '400') and words_of('3.') == ('3',)


def digits(**changes):
  options = {
    'unseen': ('3', '8'),
    'val_classes': ('0',),
    'class_vectors': ('seven_segments',),
    'test_per_class': 20,
    'val_per_class': 10,
    'meta_per_class': 5,
  }
  return load_dataset('digits', to_device=lambda x: x, **(options | changes))


def test_no_image_of_an_unseen_class_is_learned_from():
  found = digits(profile='exponential', n_max=80, imbalance=8.0)
  unseen = np.isin(np.arange(10), (3, 8))
  for name, split in found.splits.items():
    assert not unseen[split.labels].any(), name
  assert np.bincount(found.tests['test'].labels).tolist() == [20] * 10
  assert found.counts[[3, 8]].tolist() == [0, 0]
  tail = found.counts[~unseen]
  assert tail.tolist() == [int(80 * (1 / 8) ** (c / 7)) for c in range(8)]
  assert found.unseen.tolist() == unseen.tolist()
  assert found.val_classes.tolist() == (np.arange(10) == 0).tolist()
  np.testing.assert_array_equal(found.class_vectors, EMBEDDED['seven_segments'].vectors)
  plain = digits(unseen=(), val_classes=(), class_vectors=())
  assert plain.unseen is None and plain.class_vectors is None
  assert len({plain.fingerprint, found.fingerprint, digits().fingerprint}) == 3
  with pytest.raises(UserError, match=r"val_classes: class 3 \('3'\)|class 3"):
    digits(val_classes=('3',))


# The files of Xian et al.


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return mini_zsl.write(tmp_path_factory.mktemp('xlsa') / 'MINI')


def test_xlsa_from_one_on(folder):
  sources = load_source(f'xlsa:{folder}')
  x, label, attributes = mini_zsl.planted()
  for name, split in sources.items():
    assert split.class_names == mini_zsl.NAMES, name
  unseen = np.isin(label, mini_zsl.UNSEEN)
  np.testing.assert_array_equal(sources['all'].labels, label)
  np.testing.assert_allclose(sources['all'].images[:, 0, 0], x, rtol=1e-6)
  assert not np.isin(sources['train'].labels, mini_zsl.UNSEEN).any()
  assert len(sources['train']) == 9 * 15 and len(sources['test']) == 9 * 5 + 60
  assert any('SHA-256' in line for line in sources['train'].passed_over)
  found = load_dataset(f'xlsa:{folder}', to_device=lambda x: x)
  np.testing.assert_array_equal(np.flatnonzero(found.unseen), mini_zsl.UNSEEN)
  np.testing.assert_allclose(found.class_vectors, attributes)
  # The standard split: by classes alone, and no seen class is tested on.
  standard = {'train_split': 'all', 'test_split': 'all'}
  found = load_dataset(
    f'xlsa:{folder}', to_device=lambda x: x, unseen=('animal_0',), **standard
  )
  assert set(found.tests['test'].labels) == {0}
  assert len(found.splits['train'].rows) == 11 * 20 and unseen.any()


def test_classes_in_another_order_are_matched_by_name(folder, tmp_path):
  x, label, attributes = mini_zsl.planted()
  order = np.random.default_rng(1).permutation(mini_zsl.CLASSES)
  place = np.argsort(order)
  np.savez(
    tmp_path / 'features.npz',
    features=x.astype(np.float16),
    labels=place[label],
    classes=np.array(mini_zsl.NAMES)[order],
  )
  found = load_dataset(
    f'xlsa:{tmp_path}/features.npz',
    dir=f'{folder}/att_splits.mat',
    to_device=lambda x: x,
  )
  np.testing.assert_allclose(found.class_vectors, attributes[order])
  assert {found.class_names[c] for c in np.flatnonzero(found.unseen)} == {
    mini_zsl.NAMES[c] for c in mini_zsl.UNSEEN
  }


def first(*rows):
  return np.array(rows)[:, None]


def changed(value):
  """Returns the attributes (A, C), one of which is changed."""
  attributes = mini_zsl.planted()[2].T
  attributes[2, 5] = value
  return attributes


MAT = {
  'overlap': ({'test_seen_loc': first(1, 2)}, 'parts of the split overlap|is unseen'),
  'halves': ({'trainval_loc': first(1, 2.5)}, 'must be positions of images, whole'),
  'text': ({'trainval_loc': 'all'}, 'must be positions of images, whole'),
  'beyond': ({'test_seen_loc': first(1000)}, 'but there are 240 images'),
  'from 0': ({'test_seen_loc': first(0)}, 'goes from 0'),
  'struct': (
    {'extra': {'a': 1}},
    "'extra' is of the type struct; only arrays of numbers",
  ),
  'cell of numbers': (
    {'allclasses_names': mini_zsl.cells([1.0] * 12)},
    "cell 0 of 'allclasses_names' is not a string",
  ),
  'no part': ({'test_seen_loc': None}, "has no 'test_seen_loc'"),
  'not all images': (
    {'test_seen_loc': np.zeros((0, 1))},
    'splits 195 images, but .*res101.mat has 240: are they of the same data set',
  ),
  'nan': (
    {'original_att': changed(np.nan)},
    "att_splits.mat: attribute 2 of 'animal_5' is nan",
  ),
  'same': (
    {'original_att': np.ones((mini_zsl.ATTRIBUTES, mini_zsl.CLASSES))},
    r"class 0 \('animal_0'\) and class 1 .* have the same description",
  ),
  'transposed': (
    {'original_att': changed(1.0).T},
    '12 classes are named, but there are 8 rows .* seem to be transposed',
  ),
  'missing class': (
    {'original_att': changed(1.0)[:, 1:]},
    '12 classes are named, but there are 11 rows',
  ),
}


@pytest.mark.parametrize('name', MAT)
def test_wrong_splits_are_one_line(tmp_path, name):
  changes, message = MAT[name]
  mini_zsl.write(tmp_path, **changes)
  with pytest.raises(UserError, match=message) as error:
    load_source(f'xlsa:{tmp_path}')
  assert '\n' not in str(error.value)


X, LABEL, _ = mini_zsl.planted()

FEATURES = {
  'transposed': ({'features': X}, 'has features of 10 images, but 240 labels'),
  'few labels': ({'labels': LABEL[:9] + 1}, 'features of 240 images, but 9 labels'),
  'from 0': ({'labels': LABEL}, 'labels must start at 1'),
  'halves': ({'labels': LABEL + 1.5}, 'labels must be whole numbers from 1'),
  'nan': (
    {'features': np.where(np.arange(len(X)) == 4, np.nan, X.T)},
    'features of image 5 are not finite',
  ),
  'classes': ({'labels': LABEL + 2}, 'labels go up to 13, but .* describes 12 classes'),
}


@pytest.mark.parametrize('name', FEATURES)
def test_wrong_features_are_one_line(tmp_path, name):
  changes, message = FEATURES[name]
  mini_zsl.write(tmp_path)
  whole = {'features': X.T, 'labels': LABEL + 1}
  io.savemat(tmp_path / 'res101.mat', whole | changes)
  with pytest.raises(UserError, match=message) as error:
    load_source(f'xlsa:{tmp_path}')
  assert '\n' not in str(error.value)


def test_damaged_archives_of_features_are_one_line(tmp_path):
  path = tmp_path / 'features.npz'
  mini_zsl.write(tmp_path)
  with pytest.raises(UserError, match='there is no file or folder'):
    load_source(f'xlsa:{path}')
  path.write_bytes(b'PK\x03\x04 and no more')
  with pytest.raises(UserError, match='not a zip file'):
    load_source(f'xlsa:{path}')
  for x in (X[:, 0], X.astype(str)):
    np.savez(path, features=x, labels=LABEL)
    with pytest.raises(UserError, match='features must be numbers, D for each image'):
      load_source(f'xlsa:{path}')


def test_unseen_classes_in_training_are_rejected(tmp_path):
  _, label, _ = mini_zsl.planted()
  one = np.flatnonzero(label == mini_zsl.UNSEEN[0])
  mini_zsl.write(
    tmp_path, test_seen_loc=first(one[0] + 1), test_unseen_loc=first(one[1] + 1)
  )
  with pytest.raises(UserError, match=r"\('animal_3'\) is unseen, but test_seen_loc"):
    load_source(f'xlsa:{tmp_path}')


def test_other_matlab_files_are_rejected(tmp_path):
  new = tmp_path / 'new.mat'
  new.write_bytes(b'MATLAB 7.3 MAT-file, Platform: GLNXA64' + bytes(200))
  with pytest.raises(UserError, match="version 7.3, which is not supported: .*'-v7'"):
    read_mat(str(new), ('att',))
  new.write_bytes(b'what is this' * 40)
  with pytest.raises(UserError, match='is not a readable MATLAB file'):
    read_mat(str(new), ('att',))
  zeros, cell = np.zeros((3000, 1000)), np.empty((1, 1), object)
  cell[0, 0] = zeros
  for contents in (zeros, zeros.astype(np.int8), cell):
    io.savemat(new, {'att': contents}, do_compression=True)
    with pytest.raises(UserError, match='over 200 times its size'):
      read_mat(str(new), ('att',))
  made = np.zeros(1, [('a', object)]).view(io.matlab.MatlabObject)
  io.savemat(new, {'other': io.matlab.MatlabObject(made, 'inline')})
  with pytest.raises(
    UserError, match="'other' is of the type object; only arrays of numbers"
  ):
    read_mat(str(new), ('att',))
  io.savemat(new, {'other': np.ones(3)})
  double, function = (b'\6\0\0\0\b\0\0\0' + bytes([kind, 0, 0, 0]) for kind in (6, 16))
  new.write_bytes(new.read_bytes().replace(double, function))
  with pytest.raises(
    UserError, match="'other' is of the type function; only arrays of numbers"
  ):
    read_mat(str(new), ('att',))


def test_a_custom_split(tmp_path):
  x, label, attributes = mini_zsl.planted()
  unseen = np.isin(np.arange(mini_zsl.CLASSES), mini_zsl.UNSEEN)
  path = str(tmp_path / 'own.npz')
  make_split(path, x, label, attributes, unseen, class_names=mini_zsl.NAMES)
  found = load_dataset(
    f'npz:{path}',
    to_device=lambda x: x,
    class_vectors=(path,),
    unseen=tuple(mini_zsl.NAMES[c] for c in mini_zsl.UNSEEN),
  )
  assert found.counts.tolist() == [0 if u else 16 for u in unseen]
  tested = np.bincount(found.tests['test'].labels)
  assert tested.tolist() == [20 if u else 4 for u in unseen]
  np.testing.assert_allclose(
    unit_rows(found.class_vectors)[0], unit_rows(attributes)[0]
  )
  with pytest.raises(UserError, match='labels must be whole numbers from 0 to 11'):
    make_split(path, x, label + 1, attributes, unseen, class_names=mini_zsl.NAMES)
  with pytest.raises(UserError, match='too few to split'):
    make_split(path, x[:3], label[:3], attributes, unseen, class_names=mini_zsl.NAMES)
