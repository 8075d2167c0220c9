r"""Prepares a data set once, as records that load fast and without TensorFlow.

  python -m lt_jax.prepare cifar10 [--data_dir=DIR]
  python -m lt_jax.prepare list:LISTS --images=IMAGES --name=places_lt --data_dir=DIR
  python -m lt_jax.prepare folder:IMAGES --name=birds --data_dir=DIR --short_side=320
  python -m lt_jax.prepare tfds:i_naturalist2018 --name=inat18_320 --data_dir=DIR \
    --short_side=320

The first downloads a TFDS data set, which needs TensorFlow: pip install
'lt_jax[prepare]'. The others copy listed images, folders of images, or a TFDS data set
that is already prepared, and need nothing more; the result is the source tfds:NAME.
With --short_side larger images are shrunk, so that a core can decode several times as
many.
"""

import concurrent.futures
import io
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import flags
from etils import epath

from lt_jax import commands
from lt_jax.errors import UserError
from lt_jax.files import locked, make_workdir

DATA_DIR = commands.path_flag(
  'data_dir', "Where to write; by default TFDS's own folder."
)
IMAGES = commands.path_flag('images', 'The folder that lists are relative to.')
NAME = flags.DEFINE_string('name', None, 'The name of the prepared data set.')
SHORT_SIDE = flags.DEFINE_integer(
  'short_side', 0, 'Short side to which larger images are shrunk; 0: copy the files.'
)

VERSION = '1.0.0'
QUALITY = 90
"""Quality of JPEGs that are shrunk."""

IMAGES_A_SHARD = 2048


def download(name: str, data_dir: str | None = None) -> None:
  """Downloads a TFDS data set and writes it in ArrayRecord format.

  Args:
    name: the data set, such as 'cifar10'.
    data_dir: where to write it; None for TFDS's default.

  Raises:
    UserError: TensorFlow is not installed, or there is no such data set.
  """
  try:
    import tensorflow  # noqa: F401 (TFDS needs it to prepare, not to read)
  except ImportError:
    raise UserError(
      "preparing a data set needs TensorFlow: pip install 'lt_jax[prepare]'"
    ) from None
  from lt_jax.data.sources import load_source, store_labels, tfds_builder

  builder = tfds_builder(name, data_dir=data_dir, file_format='array_record')
  builder.download_and_prepare()
  store_labels(load_source(f'tfds:{name}', data_dir))


def convert(
  source: str,
  *,
  name: str,
  data_dir: str | None = None,
  images: str | None = None,
  short_side: int = 0,
) -> dict[str, int]:
  """Writes images on disk as a data set that TFDS can read.

  Args:
    source: 'list:FOLDER', 'folder:DIR' or 'tfds:NAME', see
      `lt_jax.data.sources.load_source`.
    name: the new data set, such as 'places_lt', which is then the source tfds:NAME. It
      is checked after the source.
    data_dir: where to write it; None for TFDS's default.
    images: the folder that lists are relative to.
    short_side: pixels to which the short side of larger images is shrunk (antialiased
      bilinear, then JPEG of quality 90). 0 copies every file as it is.

  Returns:
    split -> number of images.

  Raises:
    UserError: the source or an image is damaged, a name is wrong, the data set already
      exists, or another process is preparing it.
    OSError: writing failed, as on a full disk.
  """
  import tensorflow_datasets as tfds

  from lt_jax.data.sources import passed_over

  if short_side < 0:
    raise UserError(f'--short_side is {short_side}; it must be 0 or more')
  sources = _opened(source, data_dir, images)
  if not name:
    raise UserError('--name is missing: a name for the data set, such as places_lt')
  if not name.isidentifier() or not name.islower():
    raise UserError(f'--name is {name!r}; it must look like places_lt')
  if name in tfds.list_builders(with_community_datasets=False):
    raise UserError(f'--name is {name!r}, which is a TFDS data set; use another name')
  for line in passed_over(sources):
    print(line)
  data_dir = epath.Path(data_dir or tfds.core.constants.DATA_DIR)
  folder = make_workdir(data_dir / name)
  with locked(folder):
    _write(sources, folder / VERSION, source, short_side)
  return {split: len(one) for split, one in sources.items()}


def _opened(source: str, data_dir: str | None, images: str | None) -> dict[str, Any]:
  """Opens a source, and refuses one that cannot be prepared."""
  from lt_jax.data.sources import load_source

  kind = source.partition(':')[0]
  if kind not in ('list', 'folder', 'tfds'):
    raise UserError(f'{source!r} is not list:FOLDER, folder:DIR or tfds:NAME')
  if images and kind != 'list':
    raise UserError(f'--images is for list:FOLDER, not for {source}')
  sources = load_source(source, data_dir if kind == 'tfds' else images)
  if 'train' not in sources:
    raise UserError(f'{source} has no split named train: {", ".join(sources)}')
  if not sources['train'].class_names:
    raise UserError(f'{source} has images but no folders of classes')
  for split, one in sources.items():
    if getattr(one, 'attributes', {}):
      raise UserError(
        f'{source}: the split {split!r} has a gallery and probes, which records cannot '
        'store: train from the lists themselves'
      )
    if one.image_shape != (None, None, 3) or not hasattr(one, 'example'):
      raise UserError(
        f'{source} has images of shape {one.image_shape}; only colour images that '
        'differ in size can be prepared'
      )
  for label in sources['train'].class_names:
    if label != label.strip() or '\n' in label:
      raise UserError(
        f'class {label!r}: a name cannot have line breaks, or spaces at its ends'
      )
  return sources


def _write(
  sources: Mapping[str, Any], home: epath.Path, source: str, short_side: int
) -> None:
  """Writes the records and labels of all splits into DATA_DIR/NAME/VERSION.

  Raises:
    UserError: the folder already exists, or an image is damaged.
    OSError: writing failed, as on a full disk.
  """
  import tensorflow_datasets as tfds

  from lt_jax.data.sources import LABELS_FILE, UNFINISHED, write_labels

  if home.exists():
    raise UserError(f'{home} already exists; give another --name')
  # Renamed at the end, so that an interrupted copy is never mistaken for a whole one.
  unfinished = home.with_name(f'{VERSION}{UNFINISHED}')
  if unfinished.exists():
    unfinished.rmtree()
  unfinished.mkdir()
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=home.parent.name,
    version=VERSION,
    data_dir=str(unfinished),
    module_name='lt_jax',
  )
  size = f'short side {short_side} at most' if short_side else 'as they were'
  info = tfds.core.DatasetInfo(
    builder=identity,
    description=f'{source}, images {size}',
    features=tfds.features.FeaturesDict(
      {
        'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
        'label': tfds.features.ClassLabel(names=sources['train'].class_names),
      }
    ),
  )
  writer = tfds.core.SequentialWriter(
    info, max_examples_per_shard=IMAGES_A_SHARD, file_format='array_record'
  )
  try:
    writer.initialize_splits(list(sources))
    for split, one in sources.items():
      labels = []
      for row in _rows(one, split, short_side):
        writer.add_examples({split: [row]})
        labels.append(row['label'])
      write_labels(unfinished / LABELS_FILE.format(split), labels)
    writer.close_all()
  except RuntimeError as error:  # raised by array_record if a system call fails
    raise OSError(str(error)) from None
  unfinished.rename(home)


def _rows(source: Any, split: str, short_side: int) -> Iterator[dict[str, Any]]:
  """Yields the examples of a split in order; threads shrink the images."""
  from rich.progress import track

  def row(position: int) -> dict[str, Any]:
    encoded, label = source.example(position)
    image = smaller(encoded, source.where(position), short_side)
    return {'image': image, 'label': label}

  positions = range(len(source))
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for begin in track(range(0, len(source), 256), f'{split}, {len(source)} images'):
      yield from pool.map(row, positions[begin : begin + 256])


def smaller(encoded: bytes, where: str, short_side: int) -> bytes:
  """Shrinks an image to a given short side; smaller images are returned unchanged.

  Args:
    encoded: a JPEG, PNG, WebP, BMP or GIF file.
    where: its name, for messages.
    short_side: in pixels; 0 changes no image, but still checks that it is not damaged.

  Raises:
    UserError: the image is damaged.
  """
  from PIL import Image

  from lt_jax.data.crops import measured

  sides, pixels = measured(encoded, where)
  if not short_side or min(sides) <= short_side:
    return encoded
  scale = short_side / min(sides)
  size = tuple(max(short_side, round(scale * side)) for side in sides)
  file = io.BytesIO()
  resized = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
  resized.save(file, 'JPEG', quality=QUALITY)
  return file.getvalue()


def main(source: str) -> None:
  """Prepares the data set named on the command line."""
  if ':' not in source and ('/' in source or os.path.exists(source)):
    raise UserError(
      f'{source} is a path: write folder:{source} for one folder per class, or '
      f'list:{source} for lists of images'
    )
  jax.config.update('jax_platforms', 'cpu')  # devices may be busy with a run
  if ':' not in source:
    if NAME.value or IMAGES.value or SHORT_SIDE.value:
      raise UserError(
        '--name, --images and --short_side are for images on disk: prepare the TFDS '
        f'set {source} without them, then tfds:{source} with them'
      )
    download(source, DATA_DIR.value)
    return
  counts = convert(
    source,
    name=NAME.value or '',
    data_dir=DATA_DIR.value,
    images=IMAGES.value,
    short_side=SHORT_SIDE.value,
  )
  sizes = ', '.join(f'{split} {number}' for split, number in counts.items())
  print(f'tfds:{NAME.value}: {sizes}')


if __name__ == '__main__':
  wanted = 'one data set, such as cifar10 or folder:IMAGES'
  commands.launch(main, arguments=1, wanted=wanted)
