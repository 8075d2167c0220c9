"""Use from Python, as in a notebook: `lt_jax.fit`, `lt_jax.show` and `lt_jax.load`.

  result = lt_jax.fit('digits_lt:ldam_drw', 'runs/one', {'seed': 1})
  lt_jax.show('runs/one')  # as the last line of a cell: the report, inline
  network = lt_jax.load('runs/one')
  found = network.predict(['one.jpg', 'photographs/'])

They do what the commands do, and write the same run folder.
"""

import html
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lt_jax import config_file, files, run, trained
from lt_jax.config import resolve
from lt_jax.data.streams import Pass, Stream
from lt_jax.errors import UserError, one_line
from lt_jax.evals.collect import collector
from lt_jax.method import Batch, Outputs
from lt_jax.predict import Pictures, expand


def fit(
  config: str | ConfigDict,
  workdir: epath.PathLike,
  overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Trains a config, resuming an interrupted run.

  Args:
    config: what --config takes, such as 'digits_lt:ldam_drw', or a config.
    workdir: the run's folder.
    overrides: config key -> value, such as {'optimizer.name': 'adam'}, like
      --config.KEY=VALUE.

  Returns:
    What result.json holds.

  Raises:
    UserError: the config, the data or the folder is wrong.
  """
  made = config_file.make(config) if isinstance(config, str) else deepcopy(config)
  if overrides:
    try:
      config_file.prepare(made, overrides)
      made.lock()
      made.update_from_flattened_dict(dict(overrides))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise UserError(one_line(error)) from None
  return run.run(resolve(made, overrides), files.absolute(workdir))


class Page:
  """A report. A notebook shows it inline when it is the last line of a cell.

  Attributes:
    path: of report.html.
  """

  def __init__(self, path: epath.Path):
    self.path = path

  def __repr__(self) -> str:
    return f'Page({str(self.path)!r})'

  def _repr_html_(self) -> str:
    """Returns the page in a frame, so that its styles leave the notebook alone."""
    page = html.escape(self.path.read_text())
    return f'<iframe srcdoc="{page}" width="100%" height="800"></iframe>'


def show(folder: epath.PathLike) -> Page:
  """Writes the report of a run, or of all runs below a folder, and shows it.

  Args:
    folder: a run's folder, or one that holds several.

  Raises:
    UserError: there is no run in it, or the folder cannot be written.
  """
  from lt_jax import report  # which imports matplotlib

  return Page(report.write(files.absolute(folder)))


def load(workdir: epath.PathLike, which: str | None = None) -> 'Network':
  """Opens a trained run; its training data are not needed.

  Args:
    workdir: the run's folder.
    which: 'last' or 'best'; None for the State behind the run's result.

  Raises:
    UserError: there is no such run or State, or it is damaged.
  """
  opened = trained.open_run(files.absolute(workdir), which)
  opened.check_whole(workdir)
  return Network(opened)


class Predictions(NamedTuple):
  """Predictions for N images.

  Attributes:
    names: the predicted class name of each image.
    classes: (N,) int32, the predicted class numbers.
    probabilities: (N, C).
    known_score: (N,), higher for images of known classes.
    is_unknown: (N,) bool; None if the run has chosen no threshold.
    features: (N, D).
  """

  names: list[str]
  classes: np.ndarray
  probabilities: np.ndarray
  known_score: np.ndarray
  is_unknown: np.ndarray | None
  features: np.ndarray


class Network:
  """A trained network.

  Attributes:
    trained: the opened run: config, facts about its data, State.
  """

  def __init__(self, opened: trained.Trained):
    self.trained = opened
    self._collect = collector(opened.predict, _keep, opened.mesh)

  @property
  def class_names(self) -> tuple[str, ...]:
    """Names of the C classes."""
    return self.trained.class_names

  def predict(self, images: np.ndarray | str | Sequence[str]) -> Predictions:
    """Predicts images; those from files are cropped as in the run's evaluation.

    Args:
      images: an array (N, H, W, channels), with size and type as in the run's data; or
        files, folders and @LISTs, as `python -m lt_jax.predict` takes them.

    Raises:
      UserError: the array has another shape or type, or a file cannot be read.
    """
    if isinstance(images, str):
      images = [images]
    batch = self.trained.config['eval_batch']
    if isinstance(images, np.ndarray):
      one_pass = self._of_array(images, batch)
    else:
      paths = [path for name in images for path in expand(name, [])]
      if not paths:
        raise UserError('no images are given: name files, folders or @LIST')
      one_pass = Pictures(paths, self.trained, skip=False).in_batches(batch)
    found = self._collect(self.trained.state, one_pass)
    classes, threshold = found['class'], self.trained.threshold
    return Predictions(
      [self.class_names[c] for c in classes],
      classes,
      found['probabilities'],
      found['known_score'],
      None if threshold is None else found['known_score'] < threshold,
      found['features'],
    )

  def _of_array(self, images: np.ndarray, batch: int) -> Pass:
    shape, dtype = tuple(self.trained.facts['image_shape']), self.trained.dtype
    if images.shape[1:] != shape or images.dtype != dtype or not len(images):
      raise UserError(
        f'images are {images.dtype} of shape {images.shape}; the network takes {dtype} '
        f'of shape (N, {", ".join(map(str, shape))})'
      )

    def payload(step: int) -> dict[str, np.ndarray]:
      here = images[step * batch : (step + 1) * batch]
      missing = [(0, batch - len(here)), *[(0, 0)] * len(shape)]
      return {'image': np.pad(here, missing)}

    shapes = {'image': jax.ShapeDtypeStruct((batch, *shape), dtype)}
    stream = Stream({}, payload, _as_given, workers=0, shapes=shapes)
    return Pass(stream, -(-len(images) // batch), len(images))


def _as_given(arrays: Batch, payload: Batch, key: jax.Array) -> Batch:
  """Returns the batch as the host made it; a single function, so it compiles once."""
  del arrays, key
  return payload


def _keep(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns the outputs that `Predictions` are made of."""
  del batch
  kept = {name: outputs[name] for name in ('probabilities', 'known_score', 'features')}
  return {**kept, 'class': outputs['logits'].argmax(-1).astype('int32')}
