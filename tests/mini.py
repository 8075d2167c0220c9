"""Miniatures of ImageNet-LT, Places-LT, iNaturalist and MS1M-LT: generated images."""

import io

import numpy as np
from PIL import Image

CLASSES = 1000
COUNTS = (9, 6, 3, *[1] * (CLASSES - 3))
"""Training images of each class."""
EVALUATED = 4
"""Classes with images in 'val' and 'test', two each."""


def photograph(rng, label):
  """Returns a JPEG whose colour shows its class; open images have another colour."""
  height, width = rng.integers(36, 64, 2)
  colour = np.array([(220, 40, 40), (40, 220, 40), (40, 40, 220), (200, 200, 40)])
  shade = (128, 128, 128) if label < 0 else colour[label % len(colour)]
  pixels = np.clip(shade + rng.normal(0, 20, (height, width, 3)), 0, 255)
  file = io.BytesIO()
  Image.fromarray(pixels.astype(np.uint8)).save(file, 'JPEG', quality=90)
  return file.getvalue()


def examples(rng):
  """Returns split -> (name, encoded image, label); 'open' has label -1."""
  found = {'train': [], 'val': [], 'test': [], 'open': []}
  for label, count in enumerate(COUNTS):
    few = 2 * (label < EVALUATED)
    for split, images in (('train', count), ('val', few), ('test', few)):
      folder = 'train' if split == 'train' else 'val'
      found[split] += [
        (f'{folder}/n{label:08d}/{split}_{i}.JPEG', photograph(rng, label), label)
        for i in range(images)
      ]
  found['open'] = [(f'open_{i}.JPEG', photograph(rng, -1), -1) for i in range(4)]
  return found


def write_lists(folder, rng):
  """Writes lists and images in ImageNet-LT's layout; returns the folders of both."""
  lists, root = folder / 'lists', folder / 'images'
  lists.mkdir(parents=True)
  for split, rows in examples(rng).items():
    lines = [f'{path} {label}\n' for path, _, label in rows]
    (lists / f'ImageNet_LT_{split}.txt').write_text(''.join(lines))
    for path, encoded, _ in rows:
      below = 'ImageNet_LT_open' if split == 'open' else ''
      file = root / below / path
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_bytes(encoded)
  return lists, root


def write_tfds(folder, rng):
  """Writes the same images as the TFDS set imagenet_lt, without the open ones."""
  splits = examples(rng)
  names = {'train': 'train', 'validation': 'val', 'test': 'test'}
  rows = {
    name: [
      {'image': encoded, 'label': label, 'file_name': path}
      for path, encoded, label in splits[split]
    ]
    for name, split in names.items()
  }
  return write_records(folder, 'imagenet_lt', rows)


def write_inat18(folder, rng):
  """Writes the TFDS set i_naturalist2018: 8,142 classes of 6 to 2 training images."""
  kinds = [photograph(rng, kind) for kind in range(4)]

  def row(i, label, supercategory=0):
    return {
      'id': str(i),
      'image': kinds[label % 4],
      'label': label,
      'supercategory': supercategory,
    }

  counts = [6, 5, 4, *[2] * 8139]
  rows = {
    'train': [row(i, label) for label, n in enumerate(counts) for i in range(n)],
    'validation': [row(i, label) for label in range(20) for i in range(3)],
    'test': [{**row(i, 0), 'label': -1, 'supercategory': -1} for i in range(2)],
  }
  return write_records(folder, 'i_naturalist2018', rows, shard=4096)


def write_imagenet(folder, rng):
  """Writes the TFDS set imagenet2012: 1,000 classes of 3 or 2 training images."""
  kinds = [photograph(rng, kind) for kind in range(4)]

  def row(split, i, label):
    file = f'{split}_{i}_{label}.JPEG'
    return {'image': kinds[label % 4], 'label': label, 'file_name': file}

  train = [row('train', i, c) for c in range(CLASSES) for i in range(2 + (c < 10))]
  rows = {
    'train': train,
    'validation': [row('val', i, label) for label in range(20) for i in range(3)],
    'test': [{**row('test', i, 0), 'label': -1} for i in range(2)],
  }
  return write_records(folder, 'imagenet2012', rows, shard=512)


def write_records(folder, name, rows, shard=8):
  """Writes a TFDS set with the true feature specification, as TFDS itself does."""
  import tensorflow_datasets as tfds

  info = tfds.builder(name, data_dir=folder).info
  base, _, variant = name.partition('/')
  home = folder / name / str(info.version)
  home.mkdir(parents=True)
  writer = tfds.core.SequentialWriter(
    tfds.core.DatasetInfo(
      builder=tfds.core.dataset_info.DatasetIdentity(
        name=base,
        config_name=variant or None,
        version=info.version,
        data_dir=str(home),
        module_name='tests',
      ),
      features=info.features,
    ),
    max_examples_per_shard=shard,
    file_format='array_record',
  )
  writer.initialize_splits(list(rows))
  writer.add_examples(rows)
  writer.close_all()
  return folder


PLACES_CLASSES = 365


def write_places(folder, rng, *, lists, images):
  """Writes a miniature Places-LT, with either spelling for lists and images.

  Args:
    folder: the folder for both.
    rng: random generator.
    lists: 'standard' or '256'.
    images: likewise.

  Returns:
    (folder of the lists, folder of the images).
  """
  kinds = [photograph(rng, kind) for kind in range(4)]

  def spell(how, split, label, number):
    name = f'kind_{label}' if label % 2 else f'kind_{label}/indoor'
    if how == 'standard':
      return f'{split}/{name.replace("/", "-")}/{number:08d}.jpg'
    if split == 'val':
      return f'val_256/{number:08d}.jpg'
    return f'data_256/k/{name}/{number:08d}.jpg'

  rows = {'train': [], 'val': [], 'test': []}
  number = 0
  for label in range(PLACES_CLASSES):
    few = 20 if label < 2 else 0
    for split, count in (('train', 3 - label % 2), ('val', few), ('test', few // 4)):
      for _ in range(count):
        number += 1
        rows[split].append((label, number))
  root, home = folder / 'images', folder / 'lists'
  home.mkdir(parents=True)
  prefix = 'Places_LT' if lists == 'standard' else 'Places_LT_v2'
  for split, entries in rows.items():
    place = 'train' if split == 'train' else 'val'
    lines = [f'{spell(lists, place, label, n)} {label}\n' for label, n in entries]
    (home / f'{prefix}_{split}.txt').write_text(''.join(lines))
    for label, n in entries:
      file = root / spell(images, place, label, n)
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_bytes(kinds[label % 4])
  return home, root


FACES = (24, 24, 9, 7, 3, 2, 1, 1)
"""Training images per identity of the miniature MS1M-LT."""

STRANGERS = 4
"""Identities without training images."""


def write_faces(folder, rng):
  """Writes a miniature MS1M-LT; returns its lists, and the folder of the images.

  A face is a picture of a few colours, the same in every image of an identity. So every
  probe is identified unless a distractor is the same picture, as is the case for the
  last identity.
  """
  lists, root = folder / 'lists', folder / 'images'
  for one in (lists, root):
    one.mkdir(parents=True)
  rows = {'train': [], 'gallery': [], 'probe': [], 'distractors': []}

  def add(split, picture, label):
    name = f'{split}_{len(rows[split])}.png'
    Image.fromarray(picture).save(root / name)
    rows[split].append(f'{name} {label}\n')

  def face():
    colours = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return colours.repeat(16, 0).repeat(16, 1)

  for label, count in enumerate((*FACES, *[0] * STRANGERS)):
    picture = face()
    for split, times in (('train', count), ('gallery', 1), ('probe', 2)):
      for _ in range(times):
        add(split, picture, label)
  for distractor in (*(face() for _ in range(5)), picture):
    add('distractors', distractor, -1)
  for split, lines in rows.items():
    (lists / f'MS1M_LT_{split}.txt').write_text(''.join(lines))
  return lists, root
