"""Image features from files: those of Xian et al., or your own.

An xlsa folder has res101.mat (features, one column per image, and labels counted from
1) and att_splits.mat (descriptions of classes, and the split of images, from 1).
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lt_jax.data.arrays import Arrays
from lt_jax.data.attributes import (
  ATT_SPLITS,
  Described,
  checked,
  described_by,
  words_of,
)
from lt_jax.data.mat import read_mat
from lt_jax.errors import UserError, named_class

PARTS = ('trainval_loc', 'test_seen_loc', 'test_unseen_loc')
"""The proposed split: positions of images, from 1, in three disjoint parts."""


class Features(NamedTuple):
  """The contents of a file of features.

  Attributes:
    x: (N, D) float32.
    label: (N,) int, from 0.
    names: names of the classes; () if the file has none.
  """

  x: np.ndarray
  label: np.ndarray
  names: tuple[str, ...]


def xlsa(path: str, splits: str | None) -> dict[str, Any]:
  """Opens features with the proposed split, unseen classes and descriptions.

  Args:
    path: a folder with res101.mat and att_splits.mat; or a file of features: .mat, or
      .npz with 'features' (N, D), 'labels' (N,) from 0 and optional 'classes' (C,), in
      any order.
    splits: the att_splits.mat; None: next to the features.

  Returns:
    'train', the training images of seen classes; 'test', the test images of seen and
    unseen classes; and 'all', every image, for splits by class: the standard split is
    data.train_split='all', data.test_split='all' and its data.unseen.

  Raises:
    UserError: a file that is missing or wrong, descriptions that do not fit, parts that
      overlap or lack an image, or images of unseen classes among those to learn from.
  """
  if not os.path.exists(path):
    raise UserError(f'xlsa:{path}: there is no file or folder {path}')
  features = os.path.join(path, 'res101.mat') if os.path.isdir(path) else path
  beside = os.path.join(os.path.dirname(features), 'att_splits.mat')
  splits = splits or beside
  variables = read_mat(splits, ATT_SPLITS)
  described = described_by(splits, variables)
  found = _read_features(features)
  names = _class_names(features, found, described)
  described = checked(splits, described, names)
  parts = _parts(splits, variables, len(found.x))
  label = found.label
  if label.max() >= len(names):
    raise UserError(
      f'{features}: labels go up to {label.max() + 1}, but {splits} describes '
      f'{len(names)} classes'
    )
  unseen = _unseen(splits, parts, label, names)
  split = sum(map(len, parts.values()))
  if split < len(label):
    raise UserError(
      f'{splits} splits {split} images, but {features} has {len(label)}: are they of '
      'the same data set?'
    )
  images = found.x[:, None, None]
  both = np.sort(np.concatenate([parts['test_seen_loc'], parts['test_unseen_loc']]))
  lines = tuple(
    f'{os.path.basename(p)}: SHA-256 {digest(p)}' for p in (features, splits)
  )

  def part(rows: np.ndarray, lines: tuple[str, ...] = ()) -> Arrays:
    return Arrays(
      images[rows], label[rows], names, lines, described=described, unseen=unseen
    )

  return {
    'train': part(parts['trainval_loc'], lines),
    'test': part(both),
    'all': part(np.arange(len(images)), lines),
  }


def digest(path: str) -> str:
  """Returns the SHA-256 of a file: there are two versions of the proposed split."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _read_features(path: str) -> Features:
  """Reads features, with labels from 0."""
  if path.endswith('.npz'):
    return _read_npz(path)
  found = read_mat(path, ('features', 'labels'))
  if set(found) != {'features', 'labels'}:
    raise UserError(f"{path} needs 'features' (D, N) and 'labels' (N, 1)")
  label = found['labels'].ravel()
  if label.dtype.kind in 'iuf' and label.min(initial=1) < 1:
    raise UserError(f'{path}: labels must start at 1, but one is {label.min()}')
  return _checked(path, found['features'].T, label, 1, ())


def _read_npz(path: str) -> Features:
  try:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as archive:
      x, label = archive['features'], archive['labels']
      names = archive['classes'] if 'classes' in archive.files else ()
  except (
    OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error
  ) as error:  # fmt: skip
    raise UserError(f'{path}: {" ".join(str(error).split())}') from None
  return _checked(path, x, label, 0, tuple(map(str, names)))


def _checked(
  path: str, x: np.ndarray, label: np.ndarray, first: int, names: tuple[str, ...]
) -> Features:
  """Returns features (N, D) with labels that count from `first`.

  Raises:
    UserError: shapes that do not match, labels that are no whole numbers, or features
      that are not finite.
  """
  if x.ndim != 2 or x.dtype.kind not in 'iuf' or not x.size:
    raise UserError(f'{path}: features must be numbers, D for each image')
  if label.shape != x.shape[:1]:
    raise UserError(f'{path} has features of {len(x)} images, but {label.size} labels')
  whole = label.dtype.kind in 'iuf' and np.array_equal(label, np.rint(label))
  if not whole or label.min() < first:
    raise UserError(f'{path}: labels must be whole numbers from {first}')
  if not np.isfinite(x).all():
    image = int(np.argmin(np.isfinite(x).all(1)))
    raise UserError(f'{path}: features of image {image + first} are not finite')
  return Features(x.astype(np.float32), label.astype(np.int32) - first, names)


def _class_names(path: str, found: Features, described: Described) -> tuple[str, ...]:
  """Returns the names of classes, in the order of the labels."""
  classes = len(described.vectors)
  if found.names and not described.names:
    raise UserError(f'{path} names its classes, but the descriptions do not')
  names = found.names or described.names or tuple(map(str, range(classes)))
  theirs = {words_of(name) for name in described.names}
  for name in found.names:
    if words_of(name) not in theirs:
      raise UserError(f'{path}: its class {name!r} has no description')
  return names


def _parts(
  path: str, variables: Mapping[str, np.ndarray], images: int
) -> dict[str, np.ndarray]:
  """Returns the parts of the proposed split, disjoint, as positions from 0."""
  parts = {}
  taken = np.zeros(images, np.int64)
  for name in PARTS:
    if name not in variables:
      raise UserError(f'{path} has no {name!r}')
    found = variables[name].ravel()
    if found.dtype.kind not in 'iuf' or not np.array_equal(found, np.rint(found)):
      raise UserError(f'{path}: {name} must be positions of images, whole numbers')
    rows = found.astype(np.int64) - 1
    if rows.size and not 0 <= rows.min() <= rows.max() < images:
      raise UserError(
        f'{path}: {name} goes from {rows.min() + 1} to {rows.max() + 1}, but there are '
        f'{images} images'
      )
    np.add.at(taken, rows, 1)
    parts[name] = np.sort(rows)
  if (taken > 1).any():
    image = int(np.argmax(taken > 1)) + 1
    raise UserError(
      f'{path}: the parts of the split overlap: image {image} is in two of them'
    )
  return parts


def _unseen(
  path: str,
  parts: Mapping[str, np.ndarray],
  label: np.ndarray,
  names: tuple[str, ...],
) -> tuple[str, ...]:
  """Returns the names of the unseen classes; training images must have none of them."""
  unseen = np.unique(label[parts['test_unseen_loc']])
  for part in PARTS[:2]:
    both = np.intersect1d(unseen, label[parts[part]])
    if both.size:
      raise UserError(
        f'{path}: {named_class(both[0], names)} is unseen, but {part} has images of it'
      )
  return tuple(names[c] for c in unseen)


def make_split(
  path: str,
  features: np.ndarray,
  labels: np.ndarray,
  vectors: np.ndarray,
  unseen: np.ndarray,
  *,
  class_names: tuple[str, ...],
  test_share: float = 0.2,
  seed: int = 0,
) -> None:
  """Writes your own features to a file that `npz:` and `data.class_vectors` can read.

  The test images are a random share of the images of every seen class, and all images
  of unseen classes.

  Args:
    path: the `.npz` to write.
    features: (N, D) numbers.
    labels: (N,) int, from 0.
    vectors: (C, A) descriptions.
    unseen: (C,) bool.
    class_names: (C,) names; put those of unseen classes into `data.unseen`.
    test_share: share of the images of each seen class.
    seed: of the draw.

  Raises:
    UserError: the sizes do not match, a label is of no class, or a seen class has too
      few images for both.
  """
  labels, unseen = np.asarray(labels), np.asarray(unseen, bool)
  sizes = {len(vectors), len(unseen), len(class_names)}
  if len(features) != len(labels) or len(sizes) > 1:
    raise UserError(
      f'make_split: {len(features)} features and {len(labels)} labels, '
      f'{len(vectors)} vectors, {len(unseen)} flags and {len(class_names)} names'
    )
  if labels.dtype.kind not in 'iu' or not np.isin(labels, np.arange(len(unseen))).all():
    raise UserError(
      f'make_split: labels must be whole numbers from 0 to {len(unseen) - 1}'
    )
  order = np.random.default_rng(seed).permutation(len(labels))
  is_test = unseen[labels]
  for c in np.flatnonzero(~unseen):
    of_class = order[labels[order] == c]
    count = round(test_share * len(of_class))
    if not 0 < count < len(of_class):
      short = named_class(c, class_names)
      raise UserError(
        f'make_split: {short} has {len(of_class)} images, too few to split'
      )
    is_test[of_class[:count]] = True
  np.savez(
    path,
    x_train=features[~is_test],
    y_train=labels[~is_test],
    x_test=features[is_test],
    y_test=labels[is_test],
    class_names=np.array(class_names),
    class_vectors=np.asarray(vectors, np.float64),
  )
