"""Lists and folders of images: contents, and faults reported with file and line."""

import copy
import errno
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from lt_jax.data import lists, sources
from lt_jax.data.dataset import load_dataset
from lt_jax.errors import UserError


def write_image(file, value=0, size=(4, 3)):
  file.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', size, (value, 0, 0)).save(file)


def write_list(folder, name, lines, images=True):
  """Writes a list, and for each line an image with the line number as red."""
  folder.mkdir(exist_ok=True)
  (folder / name).write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
  for i, line in enumerate(lines if images else ()):
    write_image(folder / line.rpartition(' ')[0], i)


def load(folder, data_dir=None):
  return sources.load_source(f'list:{folder}', data_dir)


def test_a_list_and_its_images(tmp_path):
  write_list(tmp_path, 'X_LT_train.txt', ['a/1.png 0', 'a/2.png 2', 'b/1.png 1'])
  write_list(tmp_path, 'X_LT_val.txt', ['a/3.png 2'])
  write_list(tmp_path, 'X_LT_test.txt', ['t/1.png 1', 't/2.png 0'])
  write_list(tmp_path, 'X_LT_open.txt', ['o.png -1'])
  write_image(tmp_path / 't/2.png', 9, size=(7, 5))
  loaded = load(tmp_path)
  assert set(loaded) == {'train', 'val', 'test', 'open'}
  for split, labels in {
    'train': [0, 2, 1],
    'val': [2],
    'test': [1, 0],
    'open': [-1],
  }.items():
    assert loaded[split].labels.tolist() == labels
    assert loaded[split].labels.dtype == np.int32
    assert len(loaded[split]) == len(labels)
    assert loaded[split].class_names == ('0', '1', '2')
    assert loaded[split].image_shape == (None, None, 3)
  assert [image[0, 0, 0] for image in loaded['train']] == [0, 1, 2]
  assert loaded['train'][1].shape == (3, 4, 3)
  assert loaded['test'][1].shape == (5, 7, 3)
  assert loaded['test'][1].dtype == np.uint8
  assert loaded['train'].encoded(2) == (tmp_path / 'b/1.png').read_bytes()
  twin = copy.deepcopy(loaded['test'])  # with the protocol that sends it to a worker
  np.testing.assert_array_equal(twin[1], loaded['test'][1])


def test_images_in_another_folder_and_names_of_classes(tmp_path):
  write_list(tmp_path / 'lists', 'train.txt', ['a.png 0', 'b.png 1'], images=False)
  (tmp_path / 'lists' / 'classes.txt').write_text('great white shark\nox\n')
  write_image(tmp_path / 'images' / 'a.png', 3)
  write_image(tmp_path / 'images' / 'b.png', 4)
  train = load(tmp_path / 'lists', str(tmp_path / 'images'))['train']
  assert train.class_names == ('great white shark', 'ox')
  assert train[1][0, 0, 0] == 4


def test_paths_with_blanks_unicode_and_windows_line_ends(tmp_path):
  text = '\ufeffmy cats/grüne\u2028 katze 7.png   0\r\n./犬/1 .png\t1\r\n\r\n'
  (tmp_path / 'train.txt').write_bytes(text.encode())
  one = lists.read_list(str(tmp_path / 'train.txt'))
  assert one.paths == ['my cats/grüne\u2028 katze 7.png', '犬/1 .png']
  assert one.labels.tolist() == [0, 1]
  for path in one.paths:
    write_image(tmp_path / path, 5)
  assert load(tmp_path)['train'][0][0, 0, 0] == 5


@pytest.mark.parametrize(
  ('name', 'lines', 'message'),
  [
    ('train', ['path label', 'b.png 0'], ":1: expected a path.*'path label'"),
    (
      'train',
      ['a.png 0', 'b.png 1.0'],
      ":2: expected .* an integer, got 'b.png 1.0'",
    ),
    ('train', ['a.png 0', 'b 2.png'], ":2: expected a path.*'b 2.png'"),
    ('train', ['a.png 0', 'b.png'], ":2: expected a path.*'b.png'"),
    ('train', ['a.png 0', '1'], ":2: expected a path.*'1'"),
    ('train', ['a.png 0', '', 'b.png 1'], ':2: an empty line'),
    ('train', [], ':1: an empty line'),
    ('train', ['a.png 0', 'b.png -1'], ':2: label -1: it must not be negative'),
    ('train', ['a.png 0', 'b.png 99999999999'], ':2: expected a path'),
    ('train', ['a.png 0', 'b.png 7'], ':2: label 7, but there are only 2 images'),
    ('train', ['a.png 0', '/etc/b.png 0'], ":2: '/etc/b.png' is not the relative"),
    ('train', ['a.png 0', 'c/../../b.png 0'], r":2: '../b.png' is not the relative"),
    (
      'test',
      ['c.png 1', 'd.png 2'],
      r':2: label 2, but .*train.txt has labels up to 1',
    ),
    (
      'train',
      ['a.png 1', 'b.png 2', 'e.png 2'],
      ': labels must start at 0; these start at 1',
    ),
    ('val', ['c.png -1'], ':1: label -1: it must not be negative'),
    ('open', ['c.png -1', 'd.png 0'], ':2: label 0: in an open list all are -1'),
    ('open', ['c.png -2'], ':1: label -2: in an open list all are -1'),
  ],
)
def test_faults_of_a_list_name_file_and_line(tmp_path, name, lines, message):
  write_list(tmp_path, 'train.txt', ['a.png 0', 'b.png 1'], images=False)
  write_list(tmp_path, f'{name}.txt', lines, images=False)
  with pytest.raises(UserError, match=f'{name}.txt{message}') as error:
    load(tmp_path)
  assert '\n' not in str(error.value)


def test_a_list_in_another_encoding(tmp_path):
  (tmp_path / 'train.txt').write_bytes('a.png 0\nKüche.png 1\n'.encode('latin-1'))
  with pytest.raises(UserError, match='train.txt:2: not UTF-8'):
    load(tmp_path)


def test_faults_of_the_folder_of_lists(tmp_path):
  with pytest.raises(UserError, match='list:.*absent: No such file'):
    load(tmp_path / 'absent')
  with pytest.raises(UserError, match='has neither train.txt nor'):
    load(tmp_path)
  write_list(tmp_path, 'A_train.txt', ['a.png 0', 'b.png 1'])
  (tmp_path / '._A_train.txt').write_bytes(b'\x00')
  assert len(load(tmp_path)['train']) == 2
  with pytest.raises(UserError, match='folder of images .*nowhere does not exist'):
    load(tmp_path, str(tmp_path / 'nowhere'))
  for names in ('x\n', 'x\ny\nz\n'):
    (tmp_path / 'classes.txt').write_text(names)
    count = names.count('\n')
    with pytest.raises(UserError, match=f'classes.txt names {count} classes, .* is 1'):
      load(tmp_path)
  write_list(tmp_path, 'train.txt', ['a.png 0'])
  with pytest.raises(UserError, match='several train lists: A_train.txt, train.txt'):
    load(tmp_path)


def test_all_missing_images_are_reported_at_once(tmp_path):
  write_list(tmp_path, 'train.txt', [f'a/{i:02}.png 0' for i in range(20)])
  write_list(tmp_path, 'test.txt', [f'b/{i}.png 0' for i in range(5)], images=False)
  for i in range(18):
    (tmp_path / f'a/{i:02}.png').unlink()
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / '4.png').mkdir()  # a folder is not an image
  with pytest.raises(UserError) as error:
    load(tmp_path)
  message = str(error.value)
  assert message.startswith(f'{tmp_path} lacks 23 of the listed images: a/00.png, a/01')
  assert message.endswith('a/17.png, b/0.png, b/1.png and 3 more')
  for i in range(5):
    (tmp_path / f'b/{i}.png').exists() or write_image(tmp_path / f'b/{i}.png')
  with pytest.raises(UserError, match='lacks 19 of .* a/17.png, b/4.png$'):
    load(tmp_path)


@pytest.mark.parametrize(
  ('name', 'line', 'message'),
  [
    ('train', 'b.png 1', 'train.txt:2 with label 1, .*train.txt:3 with label 1'),
    ('train', 'b.png 0', 'train.txt:2 with label 1, .*train.txt:3 with label 0'),
    ('test', 'b.png 1', 'train.txt:2 with label 1, .*test.txt:1 with label 1'),
    ('val', './b.png 1', 'train.txt:2 with label 1, .*val.txt:1 with label 1'),
    ('open', 'b.png -1', 'train.txt:2 with label 1, .*open.txt:1 with label -1'),
  ],
)
def test_an_image_is_listed_once(tmp_path, name, line, message):
  good = ['a.png 0', 'b.png 1']
  write_list(tmp_path, 'train.txt', good)
  write_list(tmp_path, f'{name}.txt', [*good, line] if name == 'train' else [line])
  with pytest.raises(UserError, match=f'b.png is listed twice: .*{message}'):
    load(tmp_path)


def test_an_image_listed_in_two_dialects_is_listed_twice(tmp_path):
  write_list(tmp_path, 'train.txt', ['train/a/1.png 0'])
  write_list(tmp_path, 'val.txt', ['data_256/a/a/1.png 0'], images=False)
  with pytest.raises(UserError, match='train/a/1.png is listed twice'):
    load(tmp_path)


STANDARD = {
  'train': ['train/ox/1.png 0', 'train/hangar-indoor/1.png 1'],
  'val': ['train/hangar-indoor/2.png 1'],
  'test': ['val/hangar-indoor/V_1.png 1', 'val/ox/V_2.png 0'],
}
SMALL = {
  'train': ['data_256/o/ox/1.png 0', 'data_256/h/hangar/indoor/1.png 1'],
  'val': ['data_256/h/hangar/indoor/2.png 1'],
  'test': ['val_256/V_1.png 1', 'val_256/V_2.png 0'],
}


@pytest.mark.parametrize('listed', [STANDARD, SMALL])
@pytest.mark.parametrize('stored', [STANDARD, SMALL])
def test_both_dialects_of_places_over_either_tree(tmp_path, listed, stored):
  root = tmp_path / 'images'
  for split in listed:
    write_list(root, f'{split}.txt', stored[split])
    (root / f'{split}.txt').unlink()
    write_list(tmp_path / 'lists', f'P_{split}.txt', listed[split], images=False)
  loaded = load(tmp_path / 'lists', str(root))
  for split, source in loaded.items():
    expected = [line.split()[0] for line in stored[split]]
    assert list(source.files) == expected
    assert [image[0, 0, 0] for image in source] == list(range(len(expected)))
    assert [f'{p} {y}' for p, y in zip(source.paths, source.labels, strict=True)] == (
      listed[split]
    )


def test_gaps_in_a_tree_are_reported_in_its_own_names(tmp_path):
  write_list(tmp_path, 'train.txt', STANDARD['train'], images=False)
  write_image(tmp_path / 'data_256/o/ox/1.png')
  with pytest.raises(UserError, match='lacks 1 of .*: data_256/h/hangar/indoor/1.png$'):
    load(tmp_path)


def test_open_images_in_a_folder_of_their_own(tmp_path):
  write_list(tmp_path, 'X_train.txt', ['a.png 0'])
  write_list(tmp_path, 'X_open.txt', ['1.png -1'], images=False)
  write_image(tmp_path / 'X_open' / '1.png', 8)
  assert load(tmp_path)['open'][0][0, 0, 0] == 8


def test_bad_images_are_named_when_they_are_read(tmp_path):
  write_list(tmp_path, 'train.txt', ['a.png 0', 'b.png 0', 'c.png 0'])
  (tmp_path / 'a.png').write_bytes(b'')
  (tmp_path / 'b.png').write_bytes(b'<html>')
  train = load(tmp_path)['train']
  (tmp_path / 'c.png').unlink()
  for i, message in enumerate(('empty', 'not an image', 'No such file')):
    with pytest.raises(UserError, match=f'{tmp_path}/{"abc"[i]}.png: .*{message}'):
      train[i]


def test_a_disk_that_fails_is_no_bad_image(tmp_path, monkeypatch):
  write_list(tmp_path, 'train.txt', ['a.png 0'])
  train = load(tmp_path)['train']

  def failing(path):
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

  monkeypatch.setattr(pathlib.Path, 'read_bytes', failing)
  with pytest.raises(OSError, match='Input/output error.*a.png'):
    train[0]


def test_the_fingerprint_is_of_paths_and_labels(tmp_path):
  def digest(name, *lines):
    write_list(tmp_path / name, 'train.txt', lines)
    return sources.fingerprint(load(tmp_path / name)['train'])

  lines = ['a.png 0', 'b.png 1', 'c.png 1']
  first = digest('1', *lines)
  assert first == digest('2', *lines)  # wherever it is
  others = [
    digest('3', 'a.png 0', 'b.png 1', 'd.png 1'),
    digest('4', 'a.png 0', 'b.png 1', 'c.png 0'),
    digest('5', 'b.png 1', 'a.png 0', 'c.png 1'),
    digest('6', *lines, 'd.png 1'),
  ]
  assert len({first, *others}) == 5
  train = load(tmp_path / '1')['train']
  assert sources.fingerprint(train, np.array([0, 1])) != sources.fingerprint(
    train, np.array([0, 2])
  )


def folder_of(path, *images):
  for i, image in enumerate(images):
    write_image(path / image, i)
  return sources.load_source(f'folder:{path}')


def test_folders_of_classes(tmp_path):
  for name in ('train/ox/1.txt', 'train/.git/1.png', 'train/ox/.2.png', 'x/1.png'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  loaded = folder_of(
    tmp_path,
    'train/ox/2.JPEG',
    'train/ox/1.png',
    'train/cat/deep/1.webp',
    'train/emu/1.bmp',
    'test/emu/1.jpg',
    'test/cat/1.Png',
    'open/1.png',
    'open/a/b/2.png',
  )
  assert set(loaded) == {'train', 'test', 'open'}
  train = loaded['train']
  assert train.class_names == loaded['open'].class_names == ('cat', 'emu', 'ox')
  assert train.labels.tolist() == [0, 1, 2, 2]
  assert list(train.paths) == [
    'train/cat/deep/1.webp',
    'train/emu/1.bmp',
    'train/ox/1.png',
    'train/ox/2.JPEG',
  ]
  assert train.labels.dtype == np.int32
  assert train[1][0, 0].tolist() == [3, 0, 0]
  assert loaded['test'].labels.tolist() == [0, 1]
  assert list(loaded['open'].paths) == ['open/1.png', 'open/a/b/2.png']
  assert loaded['open'].labels.tolist() == [-1, -1]


def test_a_folder_of_classes_alone(tmp_path):
  loaded = folder_of(tmp_path, 'b/1.png', 'a/1.png', 'a/2.png', 'loose.png')
  assert list(loaded) == ['train']
  assert list(loaded['train'].paths) == ['a/1.png', 'a/2.png', 'b/1.png']
  assert loaded['train'].labels.tolist() == [0, 0, 1]
  assert loaded['train'][2].shape == (3, 4, 3)


@pytest.mark.parametrize('below', ['', 'train/'])
def test_a_folder_without_classes_is_unlabelled(tmp_path, below):
  (tmp_path / below).mkdir(exist_ok=True)
  (tmp_path / below / 'notes.txt').touch()
  loaded = folder_of(tmp_path, f'{below}2.png', f'{below}1.JPEG')
  assert list(loaded) == ['train']
  train = loaded['train']
  assert list(train.paths) == [f'{below}1.JPEG', f'{below}2.png']
  assert train.labels.tolist() == [-1, -1] and train.class_names == ()
  assert train[1].shape == (3, 4, 3)
  assert train.passed_over == ('1 file passed over: notes.txt',)


@pytest.mark.parametrize(
  ('images', 'message'),
  [
    (
      ['train/1.png', 'test/a/1.png'],
      'nothing is known about the classes in .*test',
    ),
    (['train/a/1.png', 'test/b/1.png'], "test/b: train has no class 'b'"),
    (['train/a/1.png', 'train/b/1.txt'], 'train/b has no images'),
    (['train/a/1.png', 'open/1.txt'], 'open has no images'),
    (['train/a/1.png', 'test/1.png'], 'test has no folders of classes'),
    (['test/a/1.png'], 'has test but no train'),
    (['train/1.txt'], 'train has no folders'),
    (['1.txt'], 'must have CLASS'),
    ([], 'No such file'),
  ],
)
def test_faults_of_folders(tmp_path, images, message):
  path = tmp_path / 'set'
  for image in images:
    (path / image).parent.mkdir(parents=True, exist_ok=True)
    (path / image).write_bytes(b'')
  with pytest.raises(UserError, match=message) as error:
    folder_of(path)
  assert str(path) in str(error.value)


@pytest.mark.parametrize(
  ('folders', 'message'),
  [
    (['Train/a', 'Train/b', 'Test/a', 'Test/b'], "Test looks like the split 'test'"),
    (['train/a', 'valid/a'], "valid looks like the split 'val'"),
    (['train/a', 'validation/a'], "validation looks like the split 'val'"),
    (['train/a', 'dev/a'], "dev looks like the split 'val'"),
    (['train/a', 'Val/a'], "Val looks like the split 'val'"),
    (['train/a', 'test2017/a'], "test2017 looks like the split 'test'"),
    (['train/a', 'training_set/a'], "training_set looks like the split 'train'"),
    (
      ['bus', 'train', 'ship'],
      r"train has the name .* 'bus': .* \(and 'train', if .* name that one .*train$",
    ),
    (
      ['closed', 'open'],
      'open has the name of a split, but .*classes .* into a new folder, .*train$',
    ),
    (['train/cat', 'test/Cat'], "train has no class 'Cat'; did you mean 'cat'"),
    (['train/Caf\u00e9', 'train/Cafe\u0301'], 'two folders called .*Unicode form'),
    (['train/Caf\u00e9', 'open/Cafe\u0301'], 'is a class of train, so it is not open'),
  ],
)
def test_folders_that_could_mean_something_else(tmp_path, folders, message):
  with pytest.raises(UserError, match=message) as error:
    folder_of(tmp_path / 'set', *(f'{folder}/1.png' for folder in folders))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name', ['valid.txt', 'X_LT_Val.txt', 'X-dev.TXT', 'Train.txt']
)
def test_a_list_that_is_nearly_called_like_a_split(tmp_path, name):
  write_list(tmp_path, 'X_LT_train.txt', ['a.png 0'])
  (tmp_path / name).touch()
  with pytest.raises(UserError, match=f'{name} looks like the list of the split'):
    load(tmp_path)


def test_a_class_may_be_called_like_a_split_below_train(tmp_path):
  loaded = folder_of(tmp_path, 'train/train/1.png', 'train/open/1.png')
  assert loaded['train'].class_names == ('open', 'train')


def test_skipped_images_are_reported_by_split(tmp_path):
  for name in (
    'x.txt',
    'train/1.tif',
    'train/ox/1.gif',
    'test/ox/1.xml',
    'extra/1.png',
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  loaded = folder_of(tmp_path, 'train/ox/1.png', 'test/ox/1.png', 'train/.1.gif')
  assert sources.passed_over(loaded) == (
    'train: 2 files passed over: train/1.tif, train/ox/1.gif',
    'train: not used, next to the splits: extra/, x.txt',
    'test: 1 file passed over: test/ox/1.xml',
  )
  flat = sources.load_source(f'folder:{tmp_path}/train')['train']
  assert flat.passed_over == ('2 files passed over: 1.tif, ox/1.gif',)
  assert lists.passed_over_line(list('abcde')) == (
    '5 files passed over: a, b, c and 2 more'
  )


def test_links_are_followed_but_not_in_circles(tmp_path):
  for name in ('elsewhere/2.png', 'elsewhere/deep/3.png', 'set/train/ox/1.png'):
    write_image(tmp_path / name)
  (tmp_path / 'set/train/ox/more').symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'elsewhere/deep/up').symlink_to('..')
  (tmp_path / 'set/train/cat').symlink_to(tmp_path / 'cats')
  write_image(tmp_path / 'cats/4.png')
  train = folder_of(tmp_path / 'set')['train']
  assert list(train.paths) == [
    'train/cat/4.png',
    'train/ox/1.png',
    'train/ox/more/2.png',
    'train/ox/more/deep/3.png',
  ]
  assert train.passed_over == ('1 file passed over: train/ox/more/deep/up',)


@pytest.mark.parametrize(
  ('link', 'target', 'message'),
  [
    ('train/z', '.', 'are the same folder'),
    ('train/z', 'ox', 'are the same folder'),
    ('train/ox/all', '..', 'are the same folder'),
    ('val', 'test', 'are the same folder'),
    ('train/emu', 'nowhere', 'train/emu: No such file'),
    ('train/ox/more', 'nowhere', 'ox/more: No such file'),
    ('train/ox/2.png', 'nowhere', '2.png: No such file'),
    ('train/ox/2.png', '2.png', '2.png: Too many levels of symbolic links'),
    ('train/emu', 'emu', 'train/emu: Too many levels of symbolic links'),
    ('train/ox/2.png', '/dev/zero', '2.png: not a regular file'),
  ],
)
def test_links_that_mislead(tmp_path, link, target, message):
  images = [
    f'{split}/{name}/1.png' for split in ('train', 'test') for name in ('ox', 'a')
  ]
  folder_of(tmp_path, *images)
  (tmp_path / link).symlink_to(target)
  with pytest.raises(UserError, match=message) as error:
    folder_of(tmp_path)
  assert '\n' not in str(error.value)


def test_irregular_or_huge_files_are_not_read(tmp_path):
  train = folder_of(tmp_path, 'ox/1.png', 'ox/2.png')['train']
  os.mkfifo(tmp_path / 'ox/3.png')
  with pytest.raises(UserError, match='ox/3.png: not a regular file'):
    folder_of(tmp_path)
  (tmp_path / 'ox/1.png').unlink()
  (tmp_path / 'ox/3.png').rename(tmp_path / 'ox/1.png')
  os.truncate(tmp_path / 'ox/2.png', 2**40)
  for i, message in enumerate(
    ('1.png: not a regular', '2.png: 1,099,511,627,776 bytes')
  ):
    with pytest.raises(UserError, match=message):
      train[i]


def test_a_listed_image_that_is_a_link_to_itself_is_missing(tmp_path):
  write_list(tmp_path, 'train.txt', ['a.png 0', 'b.png 0'])
  (tmp_path / 'b.png').unlink()
  (tmp_path / 'b.png').symlink_to('b.png')
  with pytest.raises(UserError, match='lacks 1 of the listed images: b.png'):
    load(tmp_path)


def test_names_are_compared_whatever_their_form_of_unicode(tmp_path):
  images = ['train/Caf\u00e9/1.png', 'test/Cafe\u0301/2.png']
  loaded = folder_of(tmp_path, *images)
  assert loaded['test'].labels.tolist() == [0]
  assert loaded['train'].class_names == loaded['test'].class_names == ('Caf\u00e9',)
  lines = ['train/Cafe\u0301/1.png 0']
  write_list(tmp_path, 'train.txt', lines, images=False)
  assert load(tmp_path)['train'][0].shape == (3, 4, 3)


@pytest.mark.parametrize(
  ('name', 'images', 'classes', 'per_class'),
  [
    ('ImageNet_LT_val', 20000, 1000, 20),
    ('ImageNet_LT_test', 50000, 1000, 50),
    ('Places_LT_train', 62500, 365, (5, 4980)),
    ('Places_LT_v2_train', 62500, 365, (5, 4980)),
    ('Places_LT_val', 7300, 365, 20),
    ('Places_LT_v2_val', 7300, 365, 20),
    ('Places_LT_test', 36500, 365, 100),
    ('iNaturalist18_val', 24426, 8142, 3),
    ('ImageNet_LT_open', 18000, 0, 0),
    ('Places_LT_open', 6600, 0, 0),
  ],
)
def test_published_lists(name, images, classes, per_class):
  one = published(name)
  assert len(one.paths) == images
  if not classes:
    assert (one.labels == -1).all()
    return
  counts = np.bincount(one.labels)
  assert len(counts) == classes
  least, most = per_class if isinstance(per_class, tuple) else (per_class, per_class)
  assert (counts.min(), counts.max()) == (least, most)


def test_published_lists_have_no_image_twice():
  for prefix in ('Places_LT', 'ImageNet_LT'):
    splits = ('test', 'val', 'open') + (('train',) if prefix == 'Places_LT' else ())
    lists.check_listed_once(published(f'{prefix}_{split}') for split in splits)


def test_the_dialects_of_the_published_lists_are_one():
  to_standard = lists.DIALECTS['places365_standard']
  to_small = lists.DIALECTS['places365_256']
  for split in ('train', 'val'):
    standard, small = (published(f'Places_LT{v}_{split}') for v in ('', '_v2'))
    assert {to_small(path, '') for path in standard.paths} == set(small.paths)
    assert {to_standard(path, '') for path in small.paths} == set(standard.paths)
  train, test = published('Places_LT_train'), published('Places_LT_test')
  examples = dict(zip(train.labels.tolist(), train.paths, strict=True))
  for path, label in zip(test.paths, test.labels.tolist(), strict=True):
    assert to_standard(to_small(path, ''), examples[label]) == path


def published(name):
  file = pathlib.Path(os.environ.get('LT_JAX_LISTS', '.')) / f'{name}.txt'
  if not file.exists():
    pytest.skip(f'LT_JAX_LISTS names no folder with {name}.txt')
  return lists.read_list(str(file), is_open=name.endswith('open'))


def test_a_tree_without_test_images_may_be_tested_on_those_of_val(tmp_path):
  for path in ('train/a/1.png', 'train/b/1.png', 'val/a/2.png', 'val/b/2.png'):
    write_image(tmp_path / path)
  options = {'to_device': lambda images: images, 'image_size': 8, 'resize': 8}
  source = f'folder:{tmp_path}'
  with pytest.raises(UserError, match="no test split.* or data.test_split to 'val'"):
    load_dataset(source, **options)
  dataset = load_dataset(source, **options, test_split='val')
  assert [*dataset.every] == ['train', 'test']


@pytest.mark.parametrize(
  ('one', 'other'),
  [('seg_train', 'seg_test'), ('trainA', 'testA'), ('cats_train', 'cats_val')],
)
def test_folders_with_the_same_classes_are_splits_not_classes(tmp_path, one, other):
  for split in (one, other):
    for name in ('ox', 'cat'):
      (tmp_path / split / name).mkdir(parents=True)
      write_image(tmp_path / split / name / '1.png')
  message = (
    f'{tmp_path}/({one}|{other}) and ({one}|{other}) have the same classes and look'
  )
  with pytest.raises(UserError, match=message):
    lists.folder_source(str(tmp_path), None)
