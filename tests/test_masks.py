"""Label maps: ids, windows, sizes, lists, archives, and the layouts of data sets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lt_jax.data import augment, masks
from lt_jax.data.dataset import load_dataset
from lt_jax.data.layouts import CITYSCAPES_IDS, LAYOUTS, SIXTEEN, SYNTHIA_IDS
from lt_jax.data.masks import VOID, make_ids, nearest, resized
from lt_jax.data.palettes import CITYSCAPES, VOC, numbered, palette
from lt_jax.data.sources import load_source
from lt_jax.data.streams import Unlabelled, evaluation_pass
from lt_jax.errors import UserError
from tests.trees import (
  bdd100k,
  camvid,
  cityscapes,
  gta5,
  ids,
  photograph,
  save,
  synthia,
  voc,
)


def write_lists(folder, rows, names=('a', 'b', 'c'), split='train'):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f'{split}.txt').write_text(''.join(f'{row}\n' for row in rows))
  (folder / 'classes.txt').write_text('\n'.join(names))


def loaded(source, **options):
  return load_dataset(source, to_device=jnp.asarray, **options)


@pytest.fixture
def listed(tmp_path):
  """Two training images and a larger test image."""
  for number, size in enumerate([(12, 16), (12, 16), (24, 32)]):
    photograph(tmp_path / f'{number}.png', size, number)
    save(tmp_path / f'{number}_ids.png', ids(size, (0, 1, 2, VOID), number))
  write_lists(tmp_path, ['0.png 0_ids.png', '1.png\t1_ids.png'])
  write_lists(tmp_path, ['2.png 2_ids.png'], split='test')
  return tmp_path


def test_lists_of_two_paths_a_line(listed):
  dataset = loaded(f'list:{listed}')
  train, test = dataset.splits['train'], dataset.tests['test']
  assert dataset.class_names == ('a', 'b', 'c') and dataset.of_pixels
  stored = [np.asarray(Image.open(listed / f'{i}_ids.png')) for i in range(3)]
  expected = np.bincount(np.concatenate([x.ravel() for x in stored[:2]]), minlength=256)
  np.testing.assert_array_equal(dataset.counts, expected[:3])
  np.testing.assert_array_equal(test.example(0)['label'], stored[2])
  assert dataset.image_shape == (12, 16, 3)
  assert Unlabelled(train).example(0).keys() == {'image'}
  assert Unlabelled(train).shapes(training=True).keys() == {'image'}


def test_pixels_are_counted_once(listed, monkeypatch):
  first = loaded(f'list:{listed}')
  monkeypatch.setattr(masks, 'pixel_counts', None)  # this would be called again
  again = loaded(f'list:{listed}')
  np.testing.assert_array_equal(first.counts, again.counts)
  save(listed / '1_ids.png', ids(seed=9))
  with pytest.raises(TypeError):
    loaded(f'list:{listed}')


def test_a_window_is_of_the_same_place_in_image_and_map(tmp_path):
  image = np.arange(12 * 16).reshape(12, 16)
  save(tmp_path / 'x.png', np.repeat(image[..., None], 3, 2))
  save(tmp_path / 'y.png', image)
  write_lists(tmp_path, ['x.png y.png'], [str(i) for i in range(192)])
  dataset = loaded(f'list:{tmp_path}', test_split='none', window=(5, 7))
  split = dataset.splits['train']
  corners = set()
  for seed in range(8):
    found = split.example(0, np.random.default_rng(seed))
    assert found['image'].shape == (5, 7, 3)
    np.testing.assert_array_equal(found['image'][..., 0], found['label'])
    corners.add(int(found['label'][0, 0]))
  assert len(corners) > 2


def test_maps_are_resized_by_the_nearest_pixel_and_images_are_not(tmp_path):
  label = np.repeat(np.arange(4), 3)[None].repeat(6, 0).astype(np.uint8)  # 6 x 12
  half = nearest(label, (3, 6), (0, 0), (3, 6))
  np.testing.assert_array_equal(half[0], label[0, [1, 3, 5, 7, 9, 11]])
  double = nearest(label, (12, 24), (2, 4), (4, 6))
  np.testing.assert_array_equal(double, label.repeat(2, 0).repeat(2, 1)[2:6, 4:10])
  image = np.repeat((20 * label)[..., None], 3, 2).astype(np.uint8)
  whole = np.asarray(Image.fromarray(image).resize((24, 12), Image.Resampling.BILINEAR))
  part = resized(image, (12, 24), (2, 4), (4, 6)).astype(int)
  assert np.abs(part - whole[2:6, 4:10]).max() <= 1


def test_evaluation_is_at_the_size_of_the_map_and_of_the_largest_image(tmp_path):
  for name, size in (('a', (12, 16)), ('b', (8, 20))):
    photograph(tmp_path / f'{name}.png', size)
    save(tmp_path / f'{name}_ids.png', ids(size))
  write_lists(tmp_path, ['a.png a_ids.png'])
  write_lists(tmp_path, ['a.png a_ids.png', 'b.png b_ids.png'], split='test')
  split = loaded(f'list:{tmp_path}').tests['test']
  found = split.example(1)
  assert found['image'].shape == (12, 20, 3) and found['label'].shape == (12, 20)
  assert (found['label'][8:] == VOID).all() and (found['image'][8:] == 0).all()
  np.testing.assert_array_equal(found['label'][:8], ids((8, 20)))
  write_lists(tmp_path, ['b.png b_ids.png'], split='test')
  small = loaded(f'list:{tmp_path}', resize_to=(4, 6)).tests['test'].example(0)
  assert small['image'].shape == (4, 6, 3) and small['label'].shape == (8, 20)
  write_lists(tmp_path, ['a.png a_ids.png', 'b.png b_ids.png'], split='test')
  with pytest.raises(UserError, match=r'a.png and .*b.png differ in size, so they'):
    loaded(f'list:{tmp_path}', resize_to=(4, 6))


def test_a_pass_gives_void_as_minus_one(listed):
  dataset = loaded(f'list:{listed}')
  one = evaluation_pass(
    dataset.tests['test'], batch=2, transform=lambda key, batch: batch
  )
  payload = one.stream.payload(0)
  shapes = {name: (x.shape, x.dtype) for name, x in payload.items()}
  declared = {name: (x.shape, x.dtype) for name, x in one.stream.shapes.items()}
  assert shapes == declared
  batch = one.stream.prepare({}, payload, jax.random.key(0))
  stored = np.asarray(Image.open(listed / '2_ids.png')).astype(int)
  np.testing.assert_array_equal(batch['label'][0], np.where(stored == 255, -1, stored))


def test_maps_move_with_the_pixels_of_their_images():
  label = jnp.asarray(ids((4, 6), (-1, 0, 3)))[None].repeat(3, 0)
  batch = {'image': (label + 1)[..., None], 'label': label}
  for move in (
    lambda x: augment.flip(jax.random.key(1), x),
    lambda x: augment.pad_crop(jax.random.key(2), x, pad=2),
  ):
    moved = augment.with_maps(move, batch)
    np.testing.assert_array_equal(moved['image'][..., 0] - 1, moved['label'])
    assert (moved['label'] != label).any()


# The layouts of data sets, in miniature.


TREES = {
  'cityscapes': (cityscapes, {7: 0, 8: 1, 33: 18}),
  'cityscapes16': (cityscapes, {7: 0, 8: 1, 33: 15}),
  'gta5': (gta5, {raw: i for i, raw in enumerate(CITYSCAPES_IDS.values())}),
  'synthia': (synthia, {SYNTHIA_IDS[name]: i for i, name in enumerate(SIXTEEN)}),
  'camvid': (camvid, {0: 0, 1: 1, 10: 10}),
  'voc': (voc, {0: 0, 1: 1, 20: 20}),
  'bdd100k': (bdd100k, {0: 0, 1: 1, 18: 18}),
}


@pytest.mark.parametrize('layout', TREES)
def test_a_tree_in_the_layout_of_a_data_set(tmp_path, layout):
  write, classes = TREES[layout]
  sizes, stored = write(tmp_path)
  sources = load_source(f'{layout}:{tmp_path}')
  assert {split: len(source) for split, source in sources.items()} == sizes
  expected = np.full(stored.shape, VOID)
  for raw, number in classes.items():
    expected[stored == raw] = number
  for source in sources.values():
    np.testing.assert_array_equal(source.label_map(len(source) - 1), expected)
    assert source.class_names == LAYOUTS[layout].ids.class_names


def test_camvid_sequences_determine_dusk_and_day(tmp_path):
  camvid(tmp_path)

  def names(kind):
    found = load_source(f'{kind}:{tmp_path}')
    return {split: [*map(str, one.images_at)] for split, one in found.items()}

  assert names('camvid_day') == {
    'train': ['train/0006R0_1.png', 'train/0016E5_1.png'],
    'test': ['val/0016E5_2.png'],
  }
  dusk = {'train': ['train/0001TP_1.png'], 'test': ['test/0001TP_2.png']}
  assert names('camvid_dusk') == dusk


def test_label_files_of_bdd100k_determine_the_weather(tmp_path):
  bdd100k(tmp_path)
  rainy = load_source(f'bdd100k_rainy:{tmp_path}')
  assert rainy['train'].images_at == ('images/100k/train/e.jpg',)
  assert not rainy['train'].has_map(0)
  expected = ('images/10k/train/a.jpg', 'images/10k/val/c.jpg')
  assert rainy['val'].images_at == expected
  dataset = loaded(f'bdd100k_rainy:{tmp_path}', test_split='val')
  assert dataset.counts.sum() == 0 and len(dataset.tests['test'].rows) == 2


def test_fog_lies_over_the_images_of_cityscapes(tmp_path):
  ending = '_leftImg8bit_foggy_beta_0.02.png'
  cityscapes(tmp_path, 'leftImg8bit_foggy', ending)
  found = load_source(f'cityscapes_foggy:{tmp_path}')
  assert len(found['train']) == 2 and found['val'].images_at[0].endswith(ending)
  assert found['val'].label_map(0).max() == VOID


def test_ids_and_colours_are_those_of_the_data_sets():
  assert list(CITYSCAPES_IDS.values())[:5] == [7, 8, 11, 12, 13]
  assert list(CITYSCAPES_IDS) == list(CITYSCAPES) and len(SIXTEEN) == 16
  assert palette(SIXTEEN)[9].tolist() == [70, 130, 180]
  assert numbered(1) == (128, 0, 0) and numbered(15) == (192, 128, 128)
  assert palette(VOC)[20].tolist() == [0, 64, 128]
  assert len(np.unique(palette(['x', 'y', 'z']), axis=0)) == 3


# An archive of arrays.


def archive(path, **changes):
  rng = np.random.default_rng(0)
  arrays = {
    'x_train': rng.integers(0, 256, (3, 4, 5, 3)).astype(np.uint8),
    'y_train': rng.integers(0, 3, (3, 4, 5)).astype(np.uint8),
    'x_test': rng.integers(0, 256, (2, 4, 5, 3)).astype(np.uint8),
    'y_test': np.full((2, 4, 5), 1, np.int64),
    'class_names': np.array(['a', 'b', 'c']),
  }
  np.savez(path, **(arrays | changes))
  return f'npz:{path}'


def test_an_archive_with_label_maps(tmp_path):
  void = np.full((2, 4, 5), -1)
  void[0, 0, 0] = 2
  dataset = loaded(archive(tmp_path / 'x.npz', y_test=void))
  test = dataset.tests['test']
  assert test.arrays['label'].shape == (2, 4, 5) and 'label' not in test.numbers()
  assert test.counts(3).tolist() == [0, 0, 1]
  assert Unlabelled(test).arrays.keys() == {'image'}


# Rejected input.


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'y_train': np.full((3, 4, 5), 3)},
      'image 0 has the id 3 at row 0, column 0, whi',
    ),
    (
      {'y_train': np.zeros((3, 4, 4), int)},
      r'must be as large as the images: \(3, 4, 5',
    ),
    ({'y_train': np.zeros((3, 4, 5, 3), int)}, 'colours: store the ids of classes'),
    ({'y_train': np.zeros(3, int)}, 'some splits have label maps and others one label'),
    ({'y_test': np.full((2, 4, 5), VOID)}, "every pixel of the split 'test' is void"),
  ],
)
def test_faults_of_an_archive_are_reported(tmp_path, changes, message):
  with pytest.raises(UserError, match=message) as error:
    loaded(archive(tmp_path / 'x.npz', **changes))
  assert 'x.npz' in str(error.value) and '\n' not in str(error.value)


def of_another_size(folder):
  save(folder / '1_ids.png', ids((12, 15)))


def of_no_class(folder):
  save(folder / '1_ids.png', ids(values=(0, 77)))


def in_colours(folder):
  colours = np.array([*CITYSCAPES.values()])[ids()]
  save(folder / '1_ids.png', colours)


def damaged(folder):
  path = folder / '1_ids.png'
  path.write_bytes(path.read_bytes()[:40])


def without(folder):
  (folder / '1_ids.png').unlink()


def all_void(folder):
  save(folder / '2_ids.png', np.full((24, 32), VOID))


FAULTS = {
  of_another_size: r'1_ids.png: a label map of 15 x 12 pixels, but .*1.png has 16 x 12',
  of_no_class: r'1_ids.png: id 77 at row \d+, column \d+ is neither one of the 3',
  in_colours: r'1_ids.png: a label map in colours, those of Cityscapes \(RGB\)',
  damaged: r'1_ids.png: a label map that cannot be read',
  without: r'train.txt:2: .*1_ids.png does not exist',
  all_void: r"every pixel of the split 'test' is void",
}


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.__name__)
def test_faults_of_files_are_reported_before_anything_is_trained(listed, fault):
  fault(listed)
  with pytest.raises(UserError, match=FAULTS[fault]) as error:
    loaded(f'list:{listed}')
  assert '\n' not in str(error.value)


def test_all_label_maps_at_fault_are_counted(listed):
  of_another_size(listed)
  save(listed / '0_ids.png', ids(values=(0, 77)))
  with pytest.raises(UserError, match=r'0_ids.png: id 77 .* \(and 1 more are at fault'):
    loaded(f'list:{listed}')


def test_a_window_larger_than_an_image_is_reported(listed):
  """Before training, and also where only some scales make an image too small."""
  with pytest.raises(
    UserError, match=r'0.png: a window of 14 x 11 pixels does not fit .* 8 x 6 are left'
  ):
    loaded(f'list:{listed}', window=(11, 14), scale=(0.5, 2.0))
  split = loaded(f'list:{listed}', window=(6, 8), scale=(0.5, 0.6)).splits['train']
  small = split.crop._replace(scale=(0.3, 0.3))
  with pytest.raises(UserError, match='a window of 8 x 6 .* 5 x 4 are left'):
    split._replace(crop=small).example(0, np.random.default_rng(0))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'window': (3,)}, r'data.window is \(3,\); it must be \(\) or \(height, width\)'),
    ({'resize_to': (4, 0.5)}, 'data.resize_to is'),
    ({'scale': (0.5, 2.0)}, 'data.scale needs data.window'),
    ({'window': (4, 4), 'scale': (2.0, 1.0)}, r'data.scale is \(2.0, 1.0\)'),
    ({'image_size': 8}, 'data.image_size is for images of one class each'),
  ],
)
def test_impossible_sizes_are_reported(listed, options, message):
  with pytest.raises(UserError, match=message):
    loaded(f'list:{listed}', **options)


def test_an_image_without_its_map_is_reported(tmp_path):
  cityscapes(tmp_path)
  stem = 'val/town/town_000001_000019'
  (tmp_path / 'gtFine' / f'{stem}_gtFine_labelIds.png').unlink()
  with pytest.raises(UserError, match=r'an image without its label map gtFine/val'):
    load_source(f'cityscapes:{tmp_path}')


def test_lists_need_the_names_of_their_classes(listed):
  (listed / 'classes.txt').unlink()
  with pytest.raises(UserError, match='classes.txt is missing: lists of label maps'):
    loaded(f'list:{listed}')
  write_lists(listed, ['0.png 0_ids.png', '1.png'])
  with pytest.raises(UserError, match='train.txt:2: expected the path of an image'):
    loaded(f'list:{listed}')


def test_a_source_that_is_tested_on_needs_maps(listed):
  write_lists(listed, ['2.png -'], split='test')
  with pytest.raises(UserError, match='2.png: an image without a label map'):
    loaded(f'list:{listed}')


def test_ids_can_be_turned_into_classes():
  table = make_ids(('a', 'b'), (5, -1), void=(7,))
  np.testing.assert_array_equal(
    table.classes(np.array([[5, 7, 255]]), 'x'), [[0, 255, 255]]
  )
  with pytest.raises(UserError, match='x: id 6 at row 0, column 1 is neither one'):
    table.classes(np.array([[5, 6]]), 'x')
  assert dataclasses.is_dataclass(masks.LabelledFiles)
