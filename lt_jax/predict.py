"""Predicts the classes of images: python -m lt_jax.predict --workdir=DIR IMAGES ...

  python -m lt_jax.predict --workdir=runs/one photographs/ one.png --out=found.csv

IMAGES are image files, folders (all images below them, except hidden ones) and lists:
@FILE has one path per line, relative to the current folder, as on the command line. One
row per image is written, predicted by the checkpoint that result.json describes. Only
the run's folder is needed, not its training data.

If the network predicts every pixel, --out is a folder. It gets two files per image: the
label map, a palette PNG in the colours of the data set, and the image overlaid with it.

A network that knows classes by their descriptions accepts new ones without training:
--class_vectors=FILE, a CSV file with a row NAME,NUMBER,... per class, with as many
numbers as it was trained with (several files as in training, separated by commas).
"""

import copy
import csv
import io
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from lt_jax import commands, files, label_maps, sharding, trained
from lt_jax.build.streams import ON_BAD_IMAGE
from lt_jax.data import crops
from lt_jax.data.attributes import read_descriptions
from lt_jax.data.lists import SUFFIXES, find_images, passed_over_line, read_file
from lt_jax.data.streams import Pass, Stream
from lt_jax.errors import UserError, lookup
from lt_jax.evals.collect import Collected, collector
from lt_jax.evals.segmentation import at_labels
from lt_jax.method import Batch, Outputs
from lt_jax.screen import Screen
from lt_jax.trained import Trained

WORKDIR, WHICH = commands.workdir_flag(), commands.which_flag()
OUT = commands.out_flag('The CSV file to write, or the folder for label maps.')
TOP = flags.DEFINE_integer('top', 5, 'How many classes to list per image.')
CLASS_VECTORS = flags.DEFINE_list(
  'class_vectors', [], 'Files that describe classes which the network has not seen.'
)
ON_BAD = flags.DEFINE_enum(
  'on_bad_image', 'raise', list(ON_BAD_IMAGE), 'What to do with a damaged image.'
)

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
"""Channels of the training images -> mode in Pillow."""


def main(*images: str) -> None:
  """Predicts the images named on the command line."""
  predict(
    files.absolute(WORKDIR.value),
    images,
    OUT.value,
    top=TOP.value,
    which=WHICH.value,
    on_bad_image=ON_BAD.value,
    class_vectors=CLASS_VECTORS.value,
  )


def predict(
  workdir: epath.Path,
  images: Sequence[str],
  out: str,
  *,
  top: int = 5,
  which: str | None = None,
  on_bad_image: str = 'raise',
  class_vectors: Sequence[str] = (),
) -> int:
  """Predicts images and writes a CSV file, completely or not at all, or label maps.

  The CSV file has the columns 'path', 'prediction', 'confidence' (the probability of
  that class), 'known_score', 'is_unknown' if the run chose a threshold of the known
  score for this State, and then 'class_1', 'probability_1', 'class_2' and so on, the
  most probable class first.

  Args:
    workdir: the run's folder.
    images: files, folders and lists, see `expand`.
    out: the file to write, or the folder if the network predicts every pixel; see
      `lt_jax.label_maps`.
    top: how many classes to list per image.
    which: 'last' or 'best'; None for the State that result.json describes.
    on_bad_image: 'raise', or 'skip' to leave out images that cannot be read.
    class_vectors: files that describe further classes, see `Trained.with_classes`.

  Returns:
    The number of images predicted.

  Raises:
    UserError: a path is wrong, an image cannot be read, the run is damaged or was
      trained on images that files cannot hold, or `out` must not be replaced.
  """
  skip = lookup(ON_BAD_IMAGE, 'answer to a bad image', on_bad_image)
  if top < 1:
    raise UserError(f'--top is {top}; it must be at least 1')
  per_pixel = trained.predicts_pixels(workdir)
  if not per_pixel:
    files.check_out(out)
  elif class_vectors:
    raise UserError(
      f'{workdir} predicts every pixel, so it does not take --class_vectors'
    )
  passed_over: list[str] = []
  paths = [path for name in images for path in expand(name, passed_over)]
  if not paths:
    raise UserError('no images are given: name files, folders or @LIST')
  given = [*paths, *(name.removeprefix('@') for name in images)]
  if os.path.isfile(out) and any(_is_same(out, path) for path in given):
    raise UserError(f'--out={out} is one of the images or lists')
  places = label_maps.places(paths, out) if per_pixel else []
  batch = min(len(paths), trained.read_config(workdir)['eval_batch'])
  network = trained.open_run(workdir, which, batch)
  if class_vectors:
    network = network.with_classes(read_descriptions(class_vectors))
  channels = network.facts['image_shape'][-1]
  if network.dtype != np.uint8:
    raise UserError(
      f'{workdir} was trained on features or other float arrays, but predict reads '
      'image files; use lt_jax.evaluate or lt_jax.export instead'
    )
  if channels not in MODES:
    raise UserError(
      f'{workdir} was trained on images with {channels} channels, but image files are '
      'read as grey, RGB or RGBA; use lt_jax.evaluate or lt_jax.export instead'
    )
  batch = sharding.round_up(batch, network.mesh.size)
  pictures = Pictures(paths, network, skip)
  screen = Screen()
  if passed_over:
    screen.line(
      f'{passed_over_line(passed_over)}; images are regular files that end in '
      f'{" ".join(SUFFIXES)}'
    )
  if per_pixel:
    return _maps(network, pictures, places, batch, screen)
  found = _run(network, pictures, batch, min(top, len(network.class_names)), screen)
  if len(pictures.bad) == len(paths):
    raise UserError(f'no image could be read; the first: {pictures.bad[0]}')
  read = [i for i in range(len(paths)) if i not in pictures.bad]
  found = {name: value[read] for name, value in found.items()}
  text = _table(network, [paths[i] for i in read], found)
  files.write_atomically(out, text.encode(errors='surrogateescape'))
  _summarise(network, pictures, found['known_score'], out, screen)
  return len(read)


def _is_same(one: str, other: str) -> bool:
  return os.path.exists(other) and os.path.samefile(one, other)


def expand(name: str, passed_over: list[str]) -> Iterator[str]:
  """Yields the images that an argument stands for.

  Args:
    name: a file; a folder, for all images below it, sorted; or '@' and a file with one
      path per line, each a file or a folder.
    passed_over: other files in the folders are appended to it.

  Raises:
    UserError: the path does not exist, or is a folder without images.
  """
  if name.startswith('@'):
    name = '@' + os.path.expanduser(name[1:])
    try:
      # Spreadsheets and editors may write a byte order mark first.
      text = pathlib.Path(name[1:]).read_text('utf-8-sig', errors='surrogateescape')
    except OSError as error:
      raise UserError(f'the list {name[1:]} cannot be read: {error.strerror}') from None
    for line in filter(None, map(str.strip, text.splitlines())):
      yield from _below(line, passed_over) if os.path.isdir(line) else [line]
  elif os.path.isdir(name):
    yield from _below(name, passed_over)
  elif os.path.isfile(name):  # reading a pipe might block for ever
    yield name
  elif os.path.exists(name):
    raise UserError(f'{name} is not a regular file')
  else:
    raise UserError(f'there is no file or folder {name}')


def _below(folder: str, passed_over: list[str]) -> list[str]:
  """Returns the sorted paths of the images below a folder."""
  found = find_images(folder)
  passed_over += [os.path.join(folder, name) for name in found.others]
  if not found.images:
    raise UserError(f'{folder} has no images ({" ".join(SUFFIXES)})')
  return [os.path.join(folder, name) for name in found.images]


class Pictures:
  """Images in files, in the form that the network was trained on.

  Photographs are cropped as in evaluation. If the network was trained on images of one
  size, others are resized to it, and made grey if the training images were.

  Attributes:
    paths: of the files.
    bad: position of an unreadable image -> why.
    resized: positions of images that had another size.
  """

  def __init__(self, paths: Sequence[str], network: Trained, skip: bool):
    """Reads nothing yet; `skip` puts images that cannot be read into `bad`."""
    self.paths = paths
    self.bad: dict[int, str] = {}
    self.resized: set[int] = set()
    self._shape = tuple(network.facts['image_shape'])
    self._crop = network.crop
    self._skip = skip

  def __getitem__(self, position: int) -> np.ndarray:
    """Returns an image, (H, W, channels) uint8; zeros for one that is skipped.

    Raises:
      UserError: it cannot be read and is not to be skipped.
    """
    try:
      return self._read(position)
    except UserError as error:
      if not self._skip:
        hint = '; --on_bad_image=skip leaves it out' if len(self.paths) > 1 else ''
        raise UserError(f'{error}{hint}') from None
      self.bad[position] = str(error)
      return np.zeros(self._shape, np.uint8)

  def _read(self, position: int) -> np.ndarray:
    from PIL import Image

    path, (height, width, channels) = self.paths[position], self._shape
    encoded = read_file(path)
    if self._crop is not None:
      return self._crop.evaluation(encoded, path)
    image = Image.fromarray(crops.pixels(encoded, path)).convert(MODES[channels])
    if channels == 4:
      image.putalpha(_transparency(encoded, image.size))
    if image.size != (width, height):
      self.resized.add(position)
      # Pillow widens the filter when it shrinks an image, so that nothing aliases.
      image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(self._shape)

  def of(self, positions: Sequence[int]) -> 'Pictures':
    """Returns some of the images, in their order."""
    part = copy.copy(self)
    part.paths, part.bad = [self.paths[i] for i in positions], {}
    return part

  def in_batches(self, batch: int) -> Pass:
    """Returns one pass with the last batch padded; threads read ahead."""
    examples = len(self.paths)

    def payload(step: int) -> dict[str, np.ndarray]:
      here = range(step * batch, min((step + 1) * batch, examples))
      images = np.zeros((batch, *self._shape), np.uint8)
      for row, position in enumerate(here):
        images[row] = self[position]
      return {'image': images}

    shapes = {'image': jax.ShapeDtypeStruct((batch, *self._shape), np.uint8)}
    stream = Stream({}, payload, lambda _, made, key: made, workers=0, shapes=shapes)
    return Pass(stream, -(-examples // batch), examples)


def _transparency(encoded: bytes, size: tuple[int, int]) -> Any:
  """Returns the alpha channel of a readable image, resized."""
  from PIL import Image

  with Image.open(io.BytesIO(encoded), formats=crops.FORMATS) as image:
    return image.convert('RGBA').getchannel('A').resize(size)


def _run(
  network: Trained, pictures: Pictures, batch: int, top: int, screen: Screen
) -> Collected:
  """Returns 'class' and 'probability' (N, top), and 'known_score' (N,)."""

  def keep(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    del batch
    # By logits, because small probabilities are 0 in float32.
    _, classes = jax.lax.top_k(outputs['logits'], top)
    return {
      'class': classes,
      'probability': jnp.take_along_axis(outputs['probabilities'], classes, axis=-1),
      'known_score': outputs['known_score'],
    }

  one_pass = pictures.in_batches(batch)
  begun = itertools.count()

  def stop() -> bool:
    """Called once per batch; never stops."""
    screen.progress(next(begun))
    return False

  screen.start_bar('predicting', 0, one_pass.batches)
  try:
    collect = collector(network.predict, keep, network.mesh)
    return collect(network.state, one_pass, stop)
  finally:
    screen.stop_bar()


def _maps(
  network: Trained,
  pictures: Pictures,
  places: Sequence[pathlib.Path],
  batch: int,
  screen: Screen,
) -> int:
  """Writes the label map of every image, batch by batch; returns their number."""
  size = network.facts['image_shape'][:2]

  def keep(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    del batch
    logits = outputs['logits']
    blank = jax.ShapeDtypeStruct((len(logits), *size), np.uint8)
    return {'ids': at_labels(outputs, blank).argmax(-1).astype(np.uint8)}

  collect = collector(network.predict, keep, network.mesh)
  screen.start_bar('predicting', 0, -(-len(places) // batch))
  try:
    for begin in range(0, len(places), batch):
      here = range(begin, min(begin + batch, len(places)))
      part = pictures.of(here)
      found = collect(network.state, part.in_batches(batch), lambda: False)
      pictures.bad |= {begin + place: why for place, why in part.bad.items()}
      for place, ids in zip(here, found['ids'], strict=True):
        if place not in pictures.bad:
          image = crops.pixels(read_file(pictures.paths[place]), pictures.paths[place])
          label_maps.write(ids, image, network.class_names, places[place])
      screen.progress(begin // batch)
  finally:
    screen.stop_bar()
  if len(pictures.bad) == len(places):
    raise UserError(f'no image could be read; the first: {pictures.bad[0]}')
  for reason in pictures.bad.values():
    screen.line(f'skipped: {reason}')
  written = len(places) - len(pictures.bad)
  rows = [
    *_about(network),
    ('images', f'{written} predicted, {len(pictures.bad)} skipped'),
    *(
      ('' if number else 'classes', line)
      for number, line in enumerate(label_maps.legend(network.class_names))
    ),
  ]
  title = f'{network.config["recipe"]}, seed {network.config["seed"]}'
  folder = os.path.commonpath([place.parent for place in places])
  screen.table(title, [*rows, ('folder', folder)])
  return written


def _about(network: Trained) -> list[tuple[str, str]]:
  """Returns rows that say which network predicts, and how it sees the images."""
  state = '' if network.verified else ', UNVERIFIED'
  rows = [('checkpoint', f'stage {network.stage.name}, step {network.step}{state}')]
  return rows + [('pixels', network.predicts_by)] * network.of_several_domains


def _table(network: Trained, paths: Sequence[str], found: Collected) -> str:
  """Returns the CSV text, one row per image."""
  names, threshold = network.class_names, network.threshold
  unknown = [] if threshold is None else ['is_unknown']
  top = range(1, found['class'].shape[1] + 1)
  ranked = [f'{what}_{place}' for place in top for what in ('class', 'probability')]
  text = io.StringIO()
  table = csv.writer(text, lineterminator='\n')
  table.writerow(['path', 'prediction', 'confidence', 'known_score', *unknown, *ranked])
  for path, classes, probabilities, score in zip(
    paths, found['class'], found['probability'], found['known_score'], strict=True
  ):
    pairs = zip((names[c] for c in classes), map(_number, probabilities), strict=True)
    table.writerow(
      [
        path,
        names[classes[0]],
        _number(probabilities[0]),
        _number(score),
        *([] if threshold is None else [bool(score < threshold)]),
        *itertools.chain.from_iterable(pairs),
      ]
    )
  return text.getvalue()


def _number(value: Any) -> str:
  """Returns a number with the digits that float32 has."""
  return f'{value:.7g}'


def _summarise(
  network: Trained, pictures: Pictures, score: np.ndarray, out: str, screen: Screen
) -> None:
  """Prints a summary, with warnings."""
  for reason in pictures.bad.values():
    screen.line(f'skipped: {reason}')
  for warning in network.result.get('warnings') or ():
    screen.line(f'warning: {warning}')
  height, width, channels = network.facts['image_shape']
  if pictures.resized:
    kind = ', grey' if channels == 1 else ''
    screen.line(
      f'{len(pictures.resized)} of {len(pictures.paths)} images were resized to '
      f'{width} x {height} pixels{kind}, the form that the network was trained on'
    )
  rows = [
    *_about(network),
    ('images', f'{len(score)} predicted, {len(pictures.bad)} skipped'),
  ]
  if network.threshold is not None:
    below = (score < network.threshold).sum()
    rows.append(
      (
        'unknown',
        f'{below} of {len(score)}, whose known score is below the threshold '
        f'{network.threshold:.4g} that the run chose; for another threshold, compare '
        'the column known_score with it',
      )
    )
  elif network.result.get('threshold'):
    chosen = network.result['threshold']['value'] is not None
    step = network.result['step']
    why = f'the threshold was chosen for step {step}' if chosen else 'no threshold'
    rows.append(('unknown', f'not decided: {why}'))
  title = f'{network.config["recipe"]}, seed {network.config["seed"]}'
  screen.table(title, [*rows, ('file', out)])


if __name__ == '__main__':
  commands.launch(main, 'workdir', 'out', arguments=None)
