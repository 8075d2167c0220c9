"""A trained run, opened for use: its config, network and State.

The run's folder has everything that prediction needs; the training data are not needed.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lt_jax import build, checkpoint, files, provenance, sharding
from lt_jax.build import Experiment, Stage
from lt_jax.config import SOURCE, TARGET, Config, base_config, resolve
from lt_jax.data import augment
from lt_jax.data.attributes import Block, Described, check_distinct
from lt_jax.data.crops import Crop
from lt_jax.data.dataset import Dataset
from lt_jax.data.streams import Split
from lt_jax.errors import UserError
from lt_jax.files import MAYBE, NUMBER
from lt_jax.method import Outputs, State
from lt_jax.train import state_shapes

Facts = Mapping[str, Any]
"""The contents of data.json."""

THRESHOLD = (None, {'value': MAYBE})

FACTS = {
  'class_names': [str],
  'counts': {'train': [int], **dict.fromkeys(('meta', 'val', 'test'), (None, [int]))},
  'image_shape': [int],
  'image_dtype': (None, str),  # uint8 if an older run lacks it
  'preprocessing': {
    **dict.fromkeys(('mean', 'std'), [NUMBER]),
    **dict.fromkeys(('image_size', 'resize'), int),
    'unit': (None, str),
  },
  'threshold': THRESHOLD,
  'label_maps': (None, bool),
  'unseen': (None, [str]),
  'val_classes': (None, [str]),
  'class_vectors': (None, [int]),
}
"""What building and using a network relies on in data.json, see `files.fits`."""

RESULT = {'step': int, 'threshold': THRESHOLD, 'warnings': (None, [str])}
"""The same for result.json."""


class Trained(NamedTuple):
  """A trained network, with everything that prediction needs.

  Attributes:
    config: the resolved config of its run.
    facts: the contents of data.json: class names, image shape, preprocessing, and the
      threshold, if it was chosen for this State.
    result: the contents of result.json; empty if the run has not finished.
    stage: the stage that trained it.
    mesh: the devices.
    state: its State; prediction uses `params`, `stats` and `memory`.
    step: the step of the State.
    verified: whether the files of the State had the recorded digests.
    predicts_by: its normalisation and batch statistics, see `Experiment.predicts_by`.
  """

  config: Config
  facts: Facts
  result: Mapping[str, Any]
  stage: Stage
  mesh: Mesh
  state: State
  step: int
  verified: bool
  predicts_by: str

  @property
  def class_names(self) -> tuple[str, ...]:
    """Names of the C classes."""
    return tuple(self.facts['class_names'])

  @property
  def of_several_domains(self) -> bool:
    """Whether it was trained or tested on several domains."""
    return any(self.config[key] for key in ('sources', 'target', 'open_domains'))

  @property
  def of_pixels(self) -> bool:
    """Whether it predicts a class for every pixel rather than one per image."""
    return bool(self.facts.get('label_maps'))

  def check_whole(self, workdir: epath.PathLike) -> None:
    """Raises a `UserError` if the network predicts a class for every pixel."""
    if self.of_pixels:
      raise UserError(
        f'{workdir} predicts a class for every pixel, but this needs one per image: '
        'use lt_jax.predict to write label maps, lt_jax.evaluate to measure them'
      )

  @property
  def crop(self) -> Crop | None:
    """How photographs are cropped to one size; None if the data had one size."""
    preprocessing = self.facts['preprocessing']
    size, resize = preprocessing['image_size'], preprocessing['resize']
    return Crop(size, resize) if size else None

  @property
  def dtype(self) -> np.dtype:
    """The type of the images: uint8, or float32 for features and other arrays."""
    return np.dtype(self.facts.get('image_dtype') or 'uint8')

  @property
  def threshold(self) -> float | None:
    """The known score below which an image belongs to an unknown class.

    None if no threshold was chosen for this State.
    """
    chosen = self.facts.get('threshold')
    return chosen['value'] if chosen else None

  def with_classes(self, described: Described) -> 'Trained':
    """Returns the network with more classes, known only by their descriptions.

    Nothing is trained. If it already has a class of that name, the new description
    replaces the old one.

    Args:
      described: names and descriptions, as long as those it was trained with.

    Raises:
      UserError: the network reads no descriptions, or descriptions of another length,
        or two classes would have the same one.
    """
    head = self.state.stats['net'].get('head', {})
    if 'class_vectors' not in head:
      raise UserError(
        f'the network of recipe {self.config["recipe"]!r} reads no descriptions of '
        'classes, so no class can be added'
      )
    rows = dict(zip(self.class_names, np.asarray(head['class_vectors']), strict=True))
    width = next(iter(rows.values())).size
    if described.vectors.shape[1] != width:
      raise UserError(
        f'classes are described by {described.vectors.shape[1]} numbers, but the '
        f'network was trained with {width}'
      )
    rows |= dict(zip(described.names, described.vectors, strict=True))
    stacked = np.stack([*rows.values()]).astype(np.float32)
    check_distinct(stacked, [*rows], 'new classes')
    vectors = sharding.put_replicated(self.mesh, stacked)
    net = {**self.state.stats['net'], 'head': {**head, 'class_vectors': vectors}}
    stats = {**self.state.stats, 'net': net}
    return self._replace(
      facts={**self.facts, 'class_names': [*rows]},
      state=self.state.replace(stats=stats),
    )

  def predict(self, state: State, images: jax.Array) -> Outputs:
    """Predicts images as they are stored; a pure function.

    Args:
      state: a State of this network.
      images: (B, H, W, channels) of `dtype`.

    Returns:
      'logits' (B, C); 'probabilities' (B, C), their softmax, or their sigmoid if images
      have several classes; 'known_score' (B,), the method's or else the largest
      probability; 'features' (B, D). If pixels have classes, the first three are maps,
      (B, h, w, C) and (B, h, w).
    """
    preprocessing = self.facts['preprocessing']
    images = augment.unit(images, preprocessing.get('unit') or 'none')
    mean, std = preprocessing['mean'], preprocessing['std']
    normalised = augment.normalise(images, mean, std)
    outputs = self.stage.method.predict(state, normalised)
    probabilities = self.stage.task.probability(outputs['logits'])
    return {
      'logits': outputs['logits'],
      'probabilities': probabilities,
      'known_score': outputs.get('known_score', probabilities.max(-1)),
      'features': outputs['features'],
    }


def open_run(workdir: epath.Path, which: str | None = None, batch: int = 0) -> Trained:
  """Opens the last stage of a run, without its data.

  Args:
    workdir: the run's folder, or a copy of it.
    which: 'last' or 'best'; None for the State behind the run's result.
    batch: images to predict at once, shared by the devices; 0: as many as in the run's
      evaluation.

  Raises:
    UserError: there is no such run or State, or it is damaged.
  """
  config = read_config(workdir)
  facts = read_facts(workdir)
  path = workdir / 'result.json'
  result = {}
  if path.exists():
    result = provenance.read_json(path)
    files.check_fits(result, RESULT, path)
  experiment = build_without_data(config, facts, batch)
  *_, stage = experiment.stages.values()
  state, step, _, verified = restore(workdir, stage, experiment.mesh, which)
  if step != result.get('step'):
    facts['threshold'] = None
  elif facts.get('threshold') != result.get('threshold'):
    raise UserError(
      f'{workdir}/data.json has another threshold than result.json: one of them was '
      'changed after training; undo that'
    )
  mesh, by = experiment.mesh, experiment.predicts_by
  return Trained(config, facts, result, stage, mesh, state, step, verified, by)


def read_config(workdir: epath.Path) -> dict[str, Any]:
  """Reads the config of a run.

  Keys of `data` that it lacks are newer than the run. They get their defaults, which
  are what older versions did.

  Raises:
    UserError: there is no run, another version wrote it, or it is damaged.
  """
  path = workdir / 'config.json'
  if not path.exists():
    lost = (workdir / 'stages').exists()
    advice = '; run the training command again to write it' if lost else ''
    raise UserError(f'{workdir} is not a run: it has no config.json{advice}')
  config = checked_config(provenance.read_config(workdir), path)
  provenance.check_config(workdir, config)
  return config


def checked_config(config: Config, path: epath.PathLike) -> dict[str, Any]:
  """Returns a stored config with all keys of `data`.

  Args:
    config: the config, with the keys of today.
    path: where it was stored, for messages.

  Raises:
    UserError: a key is missing, or has a value of another type.
  """
  base = resolve(base_config())
  shapes = {k: NUMBER if isinstance(v, NUMBER) else type(v) for k, v in base.items()}
  files.check_fits(config, shapes, path)
  return {**config, 'data': base['data'] | config['data']}


def read_facts(workdir: epath.Path) -> dict[str, Any]:
  """Reads data.json of a run.

  Raises:
    UserError: it is missing, damaged, or was changed after training.
  """
  path = workdir / 'data.json'
  facts = provenance.read_json(path)
  files.check_fits(facts, FACTS, path)
  provenance.check_data(workdir, facts)
  return facts


def predicts_pixels(workdir: epath.Path) -> bool:
  """Returns whether a run predicts pixels; False if there is no such run.

  Raises:
    UserError: as for `read_facts`.
  """
  there = (workdir / 'data.json').exists()
  return there and bool(read_facts(workdir).get('label_maps'))


def build_without_data(config: Config, facts: Facts, batch: int = 0) -> Experiment:
  """Builds a run from data.json, for prediction only.

  Its streams have the shapes of the images it was trained on, but no images.

  Args:
    config: the config of the run.
    facts: the contents of data.json.
    batch: images to predict at once, shared by the devices; 0: as many as in the run's
      evaluation.
  """
  here = {'device': 'any', 'eval_batch': batch or config['eval_batch']}
  # Images of all domains have one shape, and their number does not matter.
  names = (SOURCE, TARGET, *config['domains'])
  with building():
    return build.build(
      {**config, **here}, datasets=dict.fromkeys(names, _shapes_of(facts))
    )


@contextlib.contextmanager
def building() -> Iterator[None]:
  """Reports errors in building a stored config as damage to it.

  Configs of earlier versions cannot be compared with their checkpoints.
  """
  try:
    yield
  except UserError:
    raise
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    raise UserError(f'the stored config.json cannot be built: {reason}') from error


def _shapes_of(facts: Facts) -> Dataset:
  """Returns the data set of a run as labels and shapes, without its images."""
  shape, dtype = tuple(facts['image_shape']), facts.get('image_dtype') or 'uint8'

  def split(counts: list[int]) -> Split:
    if facts.get('label_maps'):  # counts are of pixels
      arrays = {'image': (1, *shape), 'label': (1, *shape[:2])}
      stored = {k: jax.ShapeDtypeStruct(v, 'uint8') for k, v in arrays.items()}
      # The number of images is not recorded; 2**16 fill any batch.
      return Split(None, np.arange(2**16), np.full(2**16, -1, np.int32), stored)
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    images = jax.ShapeDtypeStruct((len(labels), *shape), dtype)
    return Split(None, np.arange(len(labels)), labels, {'image': images})

  return Dataset(
    splits={n: split(counts) for n, counts in facts['counts'].items() if n != 'test'},
    tests={'test': split(facts['counts']['test'])},
    counts=np.asarray(facts['counts']['train']),
    class_names=tuple(facts['class_names']),
    image_shape=shape,
    fingerprint='',
    dtype=dtype,
    described=_descriptions(facts),
    unseen=_mask(facts, 'unseen'),
    val_classes=_mask(facts, 'val_classes'),
  )


def _mask(facts: Facts, key: str) -> np.ndarray | None:
  """Returns (C,) bool, the classes listed under a key; None if there is no such key."""
  named = facts.get(key)
  return np.isin(facts['class_names'], named) if named else None


def _descriptions(facts: Facts) -> Block | None:
  """Returns descriptions of the right shape; their values are in the State."""
  shape = facts.get('class_vectors')
  return Block(np.zeros(shape), ()) if shape else None


def restore(
  workdir: epath.Path, stage: Stage, mesh: Mesh, which: str | None
) -> checkpoint.Restored:
  """Restores a State of a stage, and leaves the run's folder as it is.

  Args:
    workdir: the run's folder.
    stage: the stage.
    mesh: the devices.
    which: 'last' or 'best'; None for the State behind the run's result.

  Raises:
    UserError: there is no such State, or it is damaged.
  """
  shapes = state_shapes(stage.method, stage.streams)
  target = checkpoint.abstract(shapes, sharding.replicated(mesh))
  ladder = checkpoint.Checkpoints(workdir / 'stages' / stage.name / 'checkpoints')
  try:
    if which is None:
      which = 'best' if stage.select and ladder.best() is not None else 'last'
    if which == 'best':
      restored = ladder.restore_best(target)
    else:
      restored = ladder.restore(target, quarantine=False)
  finally:
    ladder.close()
  if restored is None:
    raise UserError(
      f'{workdir} has no {which} checkpoint of stage {stage.name!r}: '
      'run the training command again'
    )
  if provenance.recorded(workdir) is None:
    print(
      f'note: {workdir} is of an earlier version, whose checkpoints do not record '
      'whether config.json and data.json have changed'
    )
  return restored
