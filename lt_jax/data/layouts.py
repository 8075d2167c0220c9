"""The folder layouts of segmentation data sets.

Each is a source `NAME:DIR`, where DIR is the folder with the unpacked archives. A data
set's validation images are its split 'val', because the labels of its test images are
not public.
"""

import glob
import json
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from lt_jax.data.lists import read_lines
from lt_jax.data.masks import Ids, LabelledFiles, make_ids
from lt_jax.data.palettes import CAMVID, CITYSCAPES, VOC
from lt_jax.errors import UserError

Pair = tuple[str, str]
"""Paths of an image and of its label map, '' if it has none."""

NINETEEN = tuple(CITYSCAPES)
"""The evaluated classes of Cityscapes: train ids 0 to 18."""

SIXTEEN = tuple(n for n in NINETEEN if n not in ('terrain', 'truck', 'train'))
"""The classes that SYNTHIA has too."""

THIRTEEN = tuple(name for name in SIXTEEN if name not in ('wall', 'fence', 'pole'))
"""The classes that most papers report for SYNTHIA."""

CITYSCAPES_IDS = dict(
  zip(
    NINETEEN,
    (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
    strict=True,
  )
)
"""Ids in the label files of Cityscapes and GTA5; the others up to 34 are void."""

SYNTHIA_IDS = {
  'road': 3,
  'sidewalk': 4,
  'building': 2,
  'wall': 21,
  'fence': 5,
  'pole': 7,
  'traffic light': 15,
  'traffic sign': 9,
  'vegetation': 6,
  'sky': 1,
  'person': 10,
  'rider': 17,
  'car': 8,
  'bus': 19,
  'motorcycle': 12,
  'bicycle': 11,
}
"""Ids in SYNTHIA-RAND-CITYSCAPES; the others up to 22 are void."""


class Layout(NamedTuple):
  """The layout of a data set on disk.

  Attributes:
    pairs: folder -> split -> its images with their maps, sorted by name.
    ids: how the ids in its maps become classes.
  """

  pairs: Callable[[str], dict[str, list[Pair]]]
  ids: Ids


def ids_of(names: Sequence[str], stored: Mapping[str, int], highest: int) -> Ids:
  """Returns ids that map the given classes, and all others to void."""
  raw = [stored[name] for name in names]
  return make_ids(names, raw, [i for i in range(highest + 1) if i not in raw])


def layout_source(
  layout: Layout, folder: str, data_dir: str | None = None
) -> dict[str, LabelledFiles]:
  """Opens a folder in one of the `LAYOUTS`.

  Returns:
    split -> source, for the splits that have images.

  Raises:
    UserError: there are no training images, or an image lacks its map while others of
      its split have one.
  """
  del data_dir
  if not os.path.isdir(folder):
    raise UserError(f'{folder} is not a folder')
  found = {}
  for split, pairs in layout.pairs(folder).items():
    if pairs:
      images, maps = zip(*pairs, strict=True)
      _check_maps(folder, pairs)
      found[split] = LabelledFiles(folder, images, maps, layout.ids)
  if 'train' not in found:
    raise UserError(f'{folder} has no training images in the expected folders')
  return found


def _check_maps(folder: str, pairs: Sequence[Pair]) -> None:
  """Refuses an image whose label map is missing."""
  named = [(image, label) for image, label in pairs if label]
  for image, label in named:
    if not os.path.isfile(os.path.join(folder, label)):
      raise UserError(
        f'{os.path.join(folder, image)}: an image without its label map {label}'
      )


def _names(root: str, pattern: str) -> list[str]:
  """Returns paths of files relative to a folder, sorted."""
  found = glob.glob(pattern, root_dir=root, recursive=True)
  return sorted(path.replace(os.sep, '/') for path in found)


def _cityscapes(
  root: str, images: str = 'leftImg8bit', ending: str = '_leftImg8bit.png'
) -> dict[str, list[Pair]]:
  """leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/.../*_gtFine_labelIds.png.

  Args:
    root: the folder.
    images: the subfolder of the images.
    ending: the end of their file names.
  """

  def pairs(split: str) -> Iterator[Pair]:
    for path in _names(root, f'{images}/{split}/*/*{ending}'):
      below = path.removeprefix(f'{images}/').removesuffix(ending)
      yield path, f'gtFine/{below}_gtFine_labelIds.png'

  return {split: [*pairs(split)] for split in ('train', 'val')}


def _gta5(root: str) -> dict[str, list[Pair]]:
  """images/NAME.png and labels/NAME.png."""
  return {
    'train': [
      (path, f'labels/{posixpath.basename(path)}')
      for path in _names(root, 'images/*.png')
    ]
  }


def _synthia(root: str) -> dict[str, list[Pair]]:
  """RGB/NAME.png and GT/LABELS/NAME.png, with ids in one channel of 8 bits."""
  return {
    'train': [
      (path, f'GT/LABELS/{posixpath.basename(path)}')
      for path in _names(root, 'RGB/*.png')
    ]
  }


def _camvid(
  root: str, train: Sequence[str] = ('',), test: Sequence[str] = ('',), on: str = 'test'
) -> dict[str, list[Pair]]:
  """train/NAME.png and trainannot/NAME.png, and the same for val and test.

  Args:
    root: the folder.
    train: how the names of training images begin, which identifies the sequence.
    test: how the names of test images begin.
    on: the folder of the test images.
  """

  def pairs(split: str, begins: Sequence[str]) -> list[Pair]:
    paths = _names(root, f'{split}/*.png')
    names = [path.removeprefix(f'{split}/') for path in paths]
    return [
      (f'{split}/{name}', f'{split}annot/{name}')
      for name in names
      if name.startswith(tuple(begins))
    ]

  found = {'train': pairs('train', train), 'test': pairs(on, test)}
  return found | ({'val': pairs('val', ('',))} if tuple(train) == ('',) else {})


def _voc(root: str) -> dict[str, list[Pair]]:
  """JPEGImages, SegmentationClass and ImageSets/Segmentation/SPLIT.txt."""
  found = {}
  for split in ('train', 'val'):
    path = os.path.join(root, 'ImageSets', 'Segmentation', f'{split}.txt')
    names = read_lines(path) if os.path.exists(path) else []
    found[split] = [
      (f'JPEGImages/{name}.jpg', f'SegmentationClass/{name}.png') for name in names
    ]
  return found


WEATHERS = {
  'rainy': 'rainy',
  'snowy': 'snowy',
  'cloudy': 'partly cloudy',
  'overcast': 'overcast',
  'clear': 'clear',
}
"""Our names of the weather in BDD100K -> its own, `attributes.weather`."""


def _bdd100k(root: str, weather: str = '') -> dict[str, list[Pair]]:
  """images/10k/SPLIT/NAME.jpg and labels/sem_seg/masks/SPLIT/NAME.png.

  Args:
    root: the folder.
    weather: a key of `WEATHERS`. Its images in images/100k/train (if that exists) and
      images/10k/train are for training, without labels. All of its images that have a
      label map, whatever their split, are 'val', and are not trained on.
  """
  labelled = {
    split: [
      (path, f'labels/sem_seg/masks/{split}/{_stem(path)}.png')
      for path in _names(root, f'images/10k/{split}/*.jpg')
    ]
    for split in ('train', 'val')
  }
  if not weather:
    return labelled
  of_weather = _of_weather(root, WEATHERS[weather])
  tested = [
    (image, label)
    for pairs in labelled.values()
    for image, label in pairs
    if _stem(image) in of_weather and os.path.isfile(os.path.join(root, label))
  ]
  taken = {_stem(image) for image, _ in tested}
  others = _names(root, 'images/100k/train/*.jpg') + _names(root, 'images/10k/*/*.jpg')
  unlabelled = {_stem(path): path for path in reversed(others)}
  trained = [
    (path, '')
    for name, path in sorted(unlabelled.items())
    if name in of_weather and name not in taken
  ]
  return {'train': trained, 'val': tested}


def _stem(path: str) -> str:
  return posixpath.splitext(posixpath.basename(path))[0]


def _of_weather(root: str, weather: str) -> set[str]:
  """Returns the names of images with a given weather in BDD100K's label files.

  They are lists of {'name': 'x.jpg', 'attributes': {'weather': 'rainy', ...}, ...}.
  """
  files = [
    *_names(root, 'labels/**/*_train.json'),
    *_names(root, 'labels/**/*_val.json'),
  ]
  if not files:
    raise UserError(
      f'{root} has no labels/**/*_train.json, whose attributes.weather is needed'
    )
  found = set()
  for file in files:
    path = os.path.join(root, file)
    try:
      with open(path, encoding='utf-8') as opened:
        rows = json.load(opened)
      found |= {
        _stem(row['name'])
        for row in rows
        if (row.get('attributes') or {}).get('weather') == weather
      }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise UserError(
        f'{path} is no list of images with attributes.weather: {error}'
      ) from None
  return found


DAY, DUSK = ('0006R0', '0016E5'), ('0001TP',)
"""Sequences of CamVid; the names of their images begin with these."""

_camvid_ids = make_ids(tuple(CAMVID), void=(11,))
_fog = partial(
  _cityscapes,
  images='leftImg8bit_foggy',
  ending='_leftImg8bit_foggy_beta_0.02.png',
)
_of_19, _of_16, _of_13 = (
  ids_of(names, CITYSCAPES_IDS, 34) for names in (NINETEEN, SIXTEEN, THIRTEEN)
)

LAYOUTS: dict[str, Layout] = {
  'cityscapes': Layout(_cityscapes, _of_19),
  'cityscapes16': Layout(_cityscapes, _of_16),
  'cityscapes13': Layout(_cityscapes, _of_13),
  'cityscapes_foggy': Layout(_fog, _of_19),
  'gta5': Layout(_gta5, _of_19),
  'synthia': Layout(_synthia, ids_of(SIXTEEN, SYNTHIA_IDS, 22)),
  'synthia13': Layout(_synthia, ids_of(THIRTEEN, SYNTHIA_IDS, 22)),
  'camvid': Layout(_camvid, _camvid_ids),
  'camvid_day': Layout(partial(_camvid, train=DAY, test=DAY, on='val'), _camvid_ids),
  'camvid_dusk': Layout(partial(_camvid, train=DUSK, test=DUSK), _camvid_ids),
  'voc': Layout(_voc, make_ids(VOC)),
  'bdd100k': Layout(_bdd100k, make_ids(NINETEEN)),
  **{
    f'bdd100k_{weather}': Layout(partial(_bdd100k, weather=weather), make_ids(NINETEEN))
    for weather in WEATHERS
  },
}
"""Kind of a source -> the layout of its folder."""
