"""Runs on disk: what each recorded, and which ones differ only in the seed."""

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lt_jax import files, provenance
from lt_jax.config import config_digest, trained_by, upgraded
from lt_jax.data.longtail import shot_groups
from lt_jax.errors import UserError
from lt_jax.evals import CLASSIFICATION, TASKS, titles
from lt_jax.evals.closed_set import told_apart
from lt_jax.evals.tasks import Task
from lt_jax.files import MAYBE, NUMBER, fits
from lt_jax.writers import (
  count_rows,
  damaged_lines,
  missing_rows,
  missing_vectors,
  places,
  read_rows,
  read_vectors,
)

CONTROLS = ('ce', 'source_only')
"""Plain networks that other recipes are compared with, for one domain and for two."""

ORDER = 'sweep.json'
"""The file in the folder of a sweep with its methods, in the order in which they were
given."""

SHAPES: dict[str, Any] = {
  'config.json': {
    'name': str,
    'recipe': str,
    'seed': int,
    'data': {'many_shot': NUMBER, 'few_shot': NUMBER},
    # Older runs lack some of these.
    'task': (None, str),
    'method': (None, {}),
    **dict.fromkeys(('sources', 'target', 'open_domains'), (None, [str])),
    **dict.fromkeys(('stages', 'heads'), (None, {str: {}})),
  },
  'data.json': {
    'class_names': list,
    'counts': {'train': [int]},
    'fingerprint': str,
    'unseen': (None, [str]),
    'open_images': (None, {str: int}),
  },
  'result.json': {
    'test': {
      **dict.fromkeys(titles(), MAYBE),
      'class_accuracy': (None, [MAYBE]),
      'iou_by_class': (None, [MAYBE]),
      'class_average_precision': (None, [MAYBE]),
    },
    'val': (None, dict.fromkeys(titles(), MAYBE)),
    'threshold': (None, {'value': MAYBE}),
    'best_on_test': (None, {}),
    'versions': (None, {}),
    'warnings': (None, [str]),
    'domains': (None, {str: {}}),
    'domain_means': (None, {str: {}}),
    'a_distance': (None, {str: MAYBE}),
    'wall_seconds': MAYBE,
    'select': (None, str),
  },
  'error.json': {'recipe': str, 'seed': int, 'error': str},
}
"""file -> the part of its contents that tables and figures need; see `fits`."""


class NoData(Exception):
  """A run has no data for a figure; the message names the file."""


class NotApplicable(NoData):
  """A figure makes no sense for a run: nothing is wrong, and the page leaves it out."""


class Run:
  """One run, as its folder records it; missing or damaged files are empty.

  Attributes:
    folder: its workdir.
    name: its path below the folder of the report, or the folder's own name.
    config: contents of config.json.
    data: contents of data.json.
    error: contents of error.json, which a sweep writes if a run fails.
    result: contents of result.json; empty unless the run has finished and all of these
      files are intact and belong together.
    state: 'finished', 'diverged at step 40', 'failed: OSError: no space left',
      'unfinished, at step 120', or which files are damaged.
  """

  def __init__(self, folder: epath.Path, name: str):
    """Reads the small files; arrays are read on demand."""
    self.folder, self.name = folder, printable(name)
    self._damaged: list[str] = []
    self.config = self._read('config.json')
    self.data = self._read('data.json')
    self.error = self._read('error.json')
    self.result = self._read('result.json')
    if self.config:
      self._check_provenance()
      self.config = upgraded(self.config)
      self._check_headline()
    if self._damaged:
      self.result = {}
    self.state = printable('; '.join(self._damaged) or self._progress())

  def _read(self, name: str) -> dict[str, Any]:
    if not (self.folder / name).exists():
      return {}
    try:
      found = files.read_json(self.folder / name)
    except UserError:
      found = None
    if fits(found, SHAPES[name]):
      return found
    self._damaged.append(f'{name} is damaged')
    return {}

  def _check_provenance(self) -> None:
    """Notes a config.json or data.json that contradicts the checkpoints or result."""
    try:
      if provenance.check_config(self.folder, self.config) is None:
        digest = self.result.get('config_digest')
        both = (self.config, upgraded(self.config))
        if digest is not None and digest not in map(config_digest, both):
          raise UserError
    except UserError:
      self._damaged.append('config.json was changed after training')
    try:
      provenance.check_data(self.folder, self.data)
    except UserError:
      self._damaged.append('data.json was changed after training')
      return
    fingerprint = self.data.get('fingerprint')
    if fingerprint and self.result.get('fingerprint', fingerprint) != fingerprint:
      self._damaged.append('data.json was changed after training')

  def _check_headline(self) -> None:
    """Notes a result that lacks the headline metric."""
    means = ('domains', 'domain_means')
    places = [p for key in means for p in (self.result.get(key) or {}).values()]
    places += [
      self.result[key] for key in ('test', 'best_on_test') if self.result.get(key)
    ]
    if not all(fits(place, {self.headline: NUMBER}) for place in places):
      self._damaged.append('result.json is damaged')

  @property
  def task(self) -> Task:
    """What a label is, and what is measured."""
    return TASKS.get(self.config.get('task'), CLASSIFICATION)

  @property
  def headline(self) -> str:
    """The metric that represents the run, such as 'accuracy'."""
    return self.task.headline

  @property
  def measure(self) -> str:
    """The name of the metric per class in figures."""
    return self.task.of_class

  @property
  def counted(self) -> str:
    """What has a label and is counted: images or pixels."""
    return 'pixels' if self.task.per_pixel else 'images'

  @property
  def measures_targets(self) -> bool:
    """Whether its targets have test images, so that its test metrics are theirs."""
    tested = self.result.get('domains') or ()
    return all(name in tested for name in self.config.get('target', ()))

  def logged(self, split: str) -> str:
    """Returns the metric that the log has for a split."""
    return 'accuracy' if split == 'train' else self.headline

  def _progress(self) -> str:
    """Says how far the run got, from its files."""
    if self.result:
      return 'finished'
    for event in reversed(self._events):
      if event.get('event') == 'diverged':
        return f'diverged at step {event.get("step")}'
      if event.get('event') == 'started':
        break
    if self.error:
      return f'failed: {self.error["error"]}'
    step = max((row['step'] for row in self.rows), default=0)
    return f'unfinished, at step {step}' if step else 'unfinished, without a log yet'

  @property
  def why_unfinished(self) -> str:
    """Why there is no usable result."""
    return printable('; '.join(self._damaged) or 'result.json is missing')

  def _lacks(self, name: str) -> str:
    damaged = f'{name} is damaged'
    return damaged if damaged in self._damaged else f'{name} is missing'

  @property
  def seed(self) -> int | str:
    """The seed of the run."""
    return (self.config or self.error).get('seed', '?')

  @property
  def recipe(self) -> str:
    """The recipe of the run."""
    return printable((self.config or self.error).get('recipe', 'unknown'))

  @functools.cached_property
  def rows(self) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, without damaged lines."""
    return read_rows(self.folder / 'metrics.jsonl')

  @property
  def command(self) -> str:
    """The command line that last started the run; '' if it is not known."""
    started = [r for r in self._events if r['event'] == 'started' and r.get('command')]
    return str(started[-1]['command']) if started else ''

  @functools.cached_property
  def _events(self) -> list[dict[str, Any]]:
    return read_rows(self.folder / 'events.jsonl')

  @property
  def losses(self) -> list[str]:
    """Says which rows of the log are missing or damaged, one line each."""
    lines = [
      f'{name}: {damaged}'
      for name in ('events.jsonl', 'metrics.jsonl')
      for damaged in damaged_lines(self.folder / name)
    ]
    for path in sorted((self.folder / 'stages').glob('*')):
      manifest = _newest_manifest(path)
      expected, step = manifest.get('rows') or {}, manifest.get('step', 0)
      if self.result and step > (manifest.get('first') or 0):  # evaluated at the end
        step += 1
        expected = {s: n if _is_before_end(s) else n + 1 for s, n in expected.items()}
      found = count_rows(places(self.rows, path.name), step)
      lost = missing_rows(expected, found, path.name, manifest.get('step', 0))
      lines += [f'metrics.jsonl: {lost}'] * bool(lost)
      vectors = {p.name: _count_vectors(p) for p in (path / 'metrics').glob('*.npz')}
      lines += missing_vectors(expected, vectors, path / 'metrics')
    return [printable(line) for line in lines]

  @functools.cached_property
  def kind(self) -> tuple[str, str]:
    """What runs that differ only in the seed share: digests of config and data."""
    if not self.config:
      return self.recipe, ''
    return config_digest(self.config), self.data.get('fingerprint', '')

  @property
  def setting(self) -> tuple[str, tuple[str, ...]]:
    """What runs must share to be compared: the data and the targets."""
    return self.data.get('fingerprint', ''), tuple(self.config.get('target', ()))

  def arrays(self, name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a .npz file.

    Raises:
      NotApplicable: this run does not write such a file, or has not yet.
      NoData: it is missing or damaged.
    """
    path = self.folder / name
    if not path.exists():
      raise (NoData if self._leaves(name) else NotApplicable)(f'{name} is missing')
    try:
      return files.read_npz(path)
    except (OSError, UserError):
      raise NoData(f'{name} is damaged') from None

  def _leaves(self, name: str) -> bool:
    """Returns whether a run like this leaves a file behind when it finishes."""
    if name == 'open_set.npz':
      return self.result.get('test', {}).get('auroc') is not None
    if name == 'weights.npz':
      learned = 'stages/*/metrics/weight_prior.npz'
      return bool(self.result) and any(self.folder.glob(learned))
    return bool(self.result) and not (name == 'features.npz' and self.task.per_pixel)

  @functools.cached_property
  def predicted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(label, prediction, confidence) of the test images, (N,) each.

    Raises:
      NoData: the file is missing, damaged, or from a version without predictions.
    """
    stored = self.arrays('predictions.npz')
    if self.task.per_pixel:
      raise NotApplicable(
        'every pixel has a label, and the predictions of single pixels are not stored'
      )
    if 'label' in stored and 'prediction' not in stored:
      raise NoData(
        'predictions.npz was written by an earlier version; repeat the command of the '
        'run to write it again'
      )
    return stored['label'], stored['prediction'], stored['confidence']

  def test(self, name: str) -> Any:
    """Returns a test metric.

    Raises:
      NotApplicable: the run has not finished.
      NoData: it has no such metric.
    """
    if not self.result:
      raise NotApplicable(self.why_unfinished)
    if self.result['test'].get(name) is None:
      raise NoData(f'result.json has no {name}')
    return self.result['test'][name]

  @property
  def counts(self) -> np.ndarray:
    """(C,) training images of each class; NoData without data.json."""
    counts = self.data.get('counts', {}).get('train')
    if not counts:
      raise NoData(self._lacks('data.json'))
    return np.array(counts)

  @property
  def class_names(self) -> list[str]:
    """Printable names of the classes."""
    names = self.data.get('class_names') or range(len(self.counts))
    return [printable(str(name)) for name in names]

  @property
  def groups(self) -> dict[str, np.ndarray]:
    """'many', 'medium' and 'few' -> (C,) bool."""
    data = self.config['data']
    groups = shot_groups(self.counts, data['many_shot'], data['few_shot'])
    seen = ~np.isin(self.class_names, self.data.get('unseen', []))
    return {name: mask & seen for name, mask in groups.items()}

  @property
  def shown_groups(self) -> dict[str, np.ndarray]:
    """The groups that have classes; {} if one of them has all."""
    groups = self.groups
    names = told_apart(name for name, mask in groups.items() if mask.any())
    return {name: groups[name] for name in names}


def _is_before_end(series: str) -> bool:
  """Returns whether a manifest at the end of a stage counts all rows of a series."""
  return series == 'train' or series.endswith('.npz')


def _newest_manifest(stage: epath.Path) -> dict[str, Any]:
  """Returns the manifest of the newest checkpoint of a stage; {} if there is none."""
  shape = {'step': int, 'first': (int, None), 'rows': ({str: int}, None)}
  found: list[dict[str, Any]] = []
  for path in (stage / 'checkpoints' / 'manifests').glob('[0-9]*.json'):
    with contextlib.suppress(UserError):
      found.append(files.read_json(path))
  whole = [manifest for manifest in found if fits(manifest, shape)]
  return max(whole, key=lambda manifest: manifest['step'], default={})


def _count_vectors(path: epath.Path) -> int:
  try:
    return len(read_vectors(path))
  except UserError:
    return 0


JOINERS = '\u200c\u200d'
"""They have no glyph, but are part of words in some scripts, and of emoji."""


def printable(text: str) -> str:
  """Replaces characters that XML or a terminal cannot show."""
  return ''.join(c if c.isprintable() or c in JOINERS else '\ufffd' for c in text)


def find(folder: epath.Path) -> list[Run]:
  """Returns the run in a folder and all runs below it, by path.

  Raises:
    UserError: there are none.
  """
  found = [Run(path, _below(path, folder)) for path in _folders(folder, set())]
  if not found:
    damaged = (folder / 'config.json').exists()
    why = 'its config.json is damaged' if damaged else 'there is no config.json'
    raise UserError(f'{folder} is not a run and contains none: {why}')
  return found


def _below(path: epath.Path, folder: epath.Path) -> str:
  if path == folder:
    return folder.name
  return os.fspath(path).removeprefix(os.fspath(folder)).lstrip('/')


def _folders(folder: epath.Path, seen: set[str]) -> Iterator[epath.Path]:
  """Yields the folders of runs; links that lead back up are not followed.

  A run may have others below it, such as those of a sweep, but not among its own files.
  A folder whose config.json or error.json is damaged counts as a run unless there are
  runs below it.
  """
  real = os.path.realpath(folder)
  if real in seen or not folder.is_dir():
    return
  seen.add(real)
  records = [_is_record(folder / name) for name in ('config.json', 'error.json')]
  paths = sorted(p for p in folder.iterdir() if not p.name.startswith('.'))
  if any(records):
    yield folder
    paths = [path for path in paths if path.name not in OF_A_RUN]
  below = [found for path in paths for found in _folders(path, seen)]
  yield from below or [folder] * (None in records and not any(records))


OF_A_RUN = ('stages', 'figures')
"""Folders of a run that hold thousands of files, but no other run."""


def _is_record(path: epath.Path) -> bool | None:
  """Returns whether a file was written by a run; None if it is damaged."""
  try:
    value = json.loads(path.read_text())
  except (ValueError, RecursionError):  # RecursionError: nested too deeply
    return None
  except OSError:
    return False
  return isinstance(value, dict) and {'recipe', 'seed'} <= value.keys()


class Group(NamedTuple):
  """Runs that differ only in the seed.

  Attributes:
    label: the recipe, and what distinguishes it from other groups of that recipe.
    anchor: a name for links, of letters, digits and '-'.
    runs: all of them by path, those without a config last.
    counted: the finished runs, one per seed, over which means are taken.
  """

  label: str
  anchor: str
  runs: list[Run]
  counted: list[Run]


def methods(folder: epath.Path) -> list[str]:
  """Returns the methods of a sweep as they were given; [] if that is not known."""
  try:
    found = files.read_json(folder / ORDER)
  except UserError:
    return []
  return found['methods'] if fits(found, {'methods': [str]}) else []


def grouped(
  runs: Sequence[Run], order: Sequence[str] = ()
) -> tuple[list[Group], list[str]]:
  """Sorts runs into groups; runs with different configs or data are kept apart.

  Args:
    runs: the runs.
    order: recipes that come first, in this order; then come `CONTROLS`, then all others
      by name.

  Returns:
    (groups; notes on runs that are not averaged).
  """
  recipes: dict[str, list[list[Run]]] = {}
  for members in _kinds(runs):
    recipes.setdefault(_recipe(members[0], runs), []).append(members)

  def place(label: str) -> tuple[int, bool, str]:
    recipe = recipes[label][0][0].recipe
    rank = order.index(recipe) if recipe in order else len(order)
    return rank, recipe not in CONTROLS, label

  groups, notes = [], []
  for recipe in sorted(recipes, key=place):
    several = recipes[recipe]
    short, full = _differences([members[0] for members in several])
    if len(several) > 1:
      notes.append(
        f'{recipe} has runs with {len(several)} different configs or data sets, which '
        f'are not averaged: {"; ".join(full)}.'
      )
    for members, difference in zip(several, short, strict=True):
      counted = {r.seed: r for r in reversed(members) if r.result}
      label = f'{recipe} ({difference})' if len(several) > 1 else recipe
      again = [r.name for r in members if r.result and counted[r.seed] is not r]
      if again:
        repeat, it = ('repeats', 'it') if len(again) == 1 else ('repeat', 'they')
        notes.append(
          f'{", ".join(again)} {repeat} the method, config and seed of another run, so '
          f'{it} {"is" if len(again) == 1 else "are"} not counted in {label}.'
        )
      anchor = f'group-{len(groups)}'
      kept = [r for r in members if counted.get(r.seed) is r]
      groups.append(Group(label, anchor, members, kept))
  return groups, notes


def _kinds(runs: Sequence[Run]) -> list[list[Run]]:
  """Sorts runs by kind; the first of each kind has a config, if any has.

  A run without a config joins the only kind of its recipe, or else is its own kind.
  """
  known: dict[str, set[tuple[str, str]]] = {}
  for run in runs:
    if run.config:
      known.setdefault(run.recipe, set()).add(run.kind)
  kinds: dict[tuple[str, str], list[Run]] = {}
  for run in runs:
    (kind, *others) = [run.kind] if run.config else known.get(run.recipe, [run.kind])
    kinds.setdefault(run.kind if others else kind, []).append(run)
  return [sorted(members, key=lambda run: not run.config) for members in kinds.values()]


def _recipe(run: Run, runs: Sequence[Run]) -> str:
  """Returns the recipe, with the data set's name if there are several."""
  if run.config and len({other.config['name'] for other in runs if other.config}) > 1:
    return f'{printable(run.config["name"])}: {run.recipe}'
  return run.recipe


def _differences(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
  """Says how the configs of a recipe's runs differ.

  Returns:
    for each run: (as few keys as distinguish the runs; all keys that differ).
  """
  described = [_described(run) for run in runs]
  keys = {key for one in described for key in one}
  differing = [
    key
    for key in sorted(keys)
    if len({one.get(key, '-') for one in described if one}) > 1
  ]

  def words(keys: Sequence[str]) -> list[str]:
    return [
      printable(', '.join(f'{key}={one.get(key, "-")}' for key in keys))
      if one
      else 'no config'
      for one in described
    ]

  def length(key: str) -> tuple[bool, int]:
    return key in DIGESTS, max(map(len, words([key])))

  short: list[str] = []
  for key in sorted(differing, key=length):
    if len(set(words([*short, key]))) > len(set(words(short))):
      short.append(key)
  return words(short), words(differing)


DIGESTS = ('config', 'data')
"""Keys of `_described` that a label uses only as a last resort."""


def _described(run: Run) -> dict[str, str]:
  """Returns the keys and values that a run was trained with; {} without a config."""
  if not run.config:
    return {}
  keys = {key: value for key, value in trained_by(run.config).items() if key != 'seed'}
  words = {k: f'{v:g}' if isinstance(v, float) else str(v) for k, v in keys.items()}
  return words | {'config': run.kind[0], 'data': run.kind[1][:7] or 'unknown'}
