"""A miniature ImageNet-LT: generated photographs of many sizes, in both formats."""

import io

import numpy as np
from PIL import Image

CLASSES = 1000
COUNTS = (9, 6, 3, *[1] * (CLASSES - 3))
"""Training images of each class."""
EVALUATED = 4
"""Classes that have images in 'val' and 'test', two each."""


def photograph(rng, label):
  """Returns a JPEG whose colour tells its class; that of an open image is another."""
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
  """Writes lists and images as ImageNet-LT has them; returns the folder of each."""
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
  """Writes the same as the TFDS set imagenet_lt, without its open images."""
  import tensorflow_datasets as tfds

  home = folder / 'imagenet_lt' / '1.0.0'
  home.mkdir(parents=True)
  info = tfds.core.DatasetInfo(
    builder=tfds.core.dataset_info.DatasetIdentity(
      name='imagenet_lt', version='1.0.0', data_dir=str(home), module_name='tests'
    ),
    features=tfds.features.FeaturesDict(
      {
        'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
        'label': tfds.features.ClassLabel(num_classes=CLASSES),
        'file_name': tfds.features.Text(),
      }
    ),
  )
  splits = examples(rng)
  names = {'train': 'train', 'validation': 'val', 'test': 'test'}
  writer = tfds.core.SequentialWriter(
    info, max_examples_per_shard=8, file_format='array_record'
  )
  writer.initialize_splits(list(names))
  writer.add_examples(
    {
      name: [
        {'image': encoded, 'label': label, 'file_name': path}
        for path, encoded, label in splits[split]
      ]
      for name, split in names.items()
    }
  )
  writer.close_all()
  return folder
