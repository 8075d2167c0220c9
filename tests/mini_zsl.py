"""A miniature of the benchmark of Xian et al., with planted linear structure."""

import numpy as np
from scipy import io

CLASSES, ATTRIBUTES, WIDTH = 12, 8, 10
UNSEEN = (3, 7, 10)
VALIDATION = ('animal_1', 'animal_5', 'animal_8')
NAMES = tuple(f'animal_{c}' for c in range(CLASSES))
PER_CLASS = 20


def planted(seed=0, noise=0.3):
  """Returns features (N, D), labels (N,) from 0 and attributes (C, A) of 0 to 100."""
  rng = np.random.default_rng(seed)
  attributes = rng.uniform(0, 100, (CLASSES, ATTRIBUTES))
  unit = attributes / np.linalg.norm(attributes, axis=1, keepdims=True)
  label = rng.permutation(np.repeat(np.arange(CLASSES), PER_CLASS))
  mixing = rng.normal(size=(ATTRIBUTES, WIDTH))
  centred = (unit - unit.mean(0)) @ mixing
  return (
    centred[label] + noise * rng.normal(size=(len(label), WIDTH)),
    label,
    attributes,
  )


def cells(names):
  """Returns a cell array of strings, as SciPy writes one."""
  made = np.empty((len(names), 1), object)
  made[:, 0] = names
  return made


def write(folder, **changes):
  """Writes res101.mat and att_splits.mat, where positions and labels start at 1."""
  x, label, attributes = planted()
  unseen = np.isin(label, UNSEEN)
  rank = np.array([(label[:i] == c).sum() for i, c in enumerate(label)])
  parts = {
    'trainval_loc': ~unseen & (rank < 15),
    'test_seen_loc': ~unseen & (rank >= 15),
    'test_unseen_loc': unseen,
  }
  splits = {
    'original_att': attributes.T,
    'att': (attributes / np.linalg.norm(attributes, axis=1, keepdims=True)).T,
    'allclasses_names': cells(NAMES),
    **{name: np.flatnonzero(m)[:, None] + 1 for name, m in parts.items()},
  }
  folder.mkdir(parents=True, exist_ok=True)
  features = {'features': x.T, 'labels': label[:, None] + 1}
  io.savemat(folder / 'res101.mat', features)
  splits = {k: v for k, v in (splits | changes).items() if v is not None}
  io.savemat(folder / 'att_splits.mat', splits)
  return folder
