"""Miniatures of data sets with label maps, each in its own layout."""

import json

import numpy as np
from PIL import Image

from lt_jax.data.layouts import CITYSCAPES_IDS, SYNTHIA_IDS
from lt_jax.data.masks import VOID
from lt_jax.data.palettes import numbered


def save(path, array, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


def photograph(path, size=(12, 16), seed=0):
  image = np.random.default_rng(seed).integers(0, 256, (*size, 3))
  save(path, image)
  return image


def ids(size=(12, 16), values=(0, 1, 2), seed=0):
  return np.random.default_rng(seed).choice(values, size)


def cityscapes(root, folder='leftImg8bit', ending='_leftImg8bit.png'):
  for split, number in (('train', 1), ('val', 1)):
    for i in range(number + 1):
      stem = f'{split}/town/town_{i:06d}_000019'
      photograph(root / folder / f'{stem}{ending}')
      stored = ids(values=(7, 8, 33, 0, 4))
      save(root / 'gtFine' / f'{stem}_gtFine_labelIds.png', stored)
  return {'train': 2, 'val': 2}, stored


def gta5(root):
  for i in range(2):
    photograph(root / 'images' / f'{i:05d}.png')
    stored = ids(values=(*CITYSCAPES_IDS.values(), 34))
    save(root / 'labels' / f'{i:05d}.png', stored)
  return {'train': 2}, stored


def synthia(root):
  photograph(root / 'RGB' / '0000000.png')
  stored = ids(values=(*SYNTHIA_IDS.values(), 0))
  save(root / 'GT' / 'LABELS' / '0000000.png', stored)
  return {'train': 1}, stored


def camvid(root):
  names = {'train': ('0001TP_1', '0006R0_1', '0016E5_1'), 'val': ('0016E5_2',)}
  for split, several in {**names, 'test': ('0001TP_2', 'Seq05VD_1')}.items():
    for name in several:
      photograph(root / split / f'{name}.png')
      stored = ids(values=(0, 1, 10, 11))
      save(root / f'{split}annot' / f'{name}.png', stored)
  return {'train': 3, 'val': 1, 'test': 2}, stored


def voc(root):
  for split in ('train', 'val'):
    photograph(root / 'JPEGImages' / f'{split}_1.jpg')
    stored = ids(values=(0, 1, 20, VOID))
    image = Image.fromarray(stored.astype(np.uint8), mode='P')
    image.putpalette([c for i in range(256) for c in numbered(i)])
    (root / 'SegmentationClass').mkdir(exist_ok=True)
    image.save(root / 'SegmentationClass' / f'{split}_1.png')
    lists = root / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f'{split}.txt').write_text(f'{split}_1\n')
  return {'train': 1, 'val': 1}, stored


WEATHER = {
  'train/a': 'rainy',
  'train/b': 'overcast',
  'val/c': 'rainy',
  'val/d': 'partly cloudy',
}


def bdd100k(root):
  for name in WEATHER:
    photograph(root / 'images' / '10k' / f'{name}.jpg')
    stored = ids(values=(0, 1, 18, VOID))
    save(root / 'labels' / 'sem_seg' / 'masks' / f'{name}.png', stored)
  for name in ('train/a', 'train/e', 'train/f'):
    photograph(root / 'images' / '100k' / f'{name}.jpg')
  weather = {**WEATHER, 'train/e': 'rainy', 'train/f': 'snowy'}
  for split in ('train', 'val'):
    rows = [
      {'name': f'{name[-1]}.jpg', 'attributes': {'weather': value}}
      for name, value in weather.items()
      if name.startswith(split)
    ]
    path = root / 'labels' / f'bdd100k_labels_images_{split}.json'
    path.write_text(json.dumps(rows))
  return {'train': 2, 'val': 2}, stored
