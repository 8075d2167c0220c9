"""Checks of several domains: how far apart they are, and what they share."""

import itertools

import numpy as np

from lt_jax.config import TARGET
from lt_jax.data import augment
from lt_jax.data.dataset import Dataset
from lt_jax.data.streams import Split
from lt_jax.doctor.case import Case, Findings, each, odd, ok, sampled, wrong
from lt_jax.doctor.data import HASHED, TOLERATED, Picture, equal


def _domains(case: Case) -> dict[str, Dataset]:
  """Returns the domains of a run if it has several, else none."""
  domains = case.experiment.domains
  return domains if len(domains) > 1 else {}


def described(case: Case) -> Findings:
  """Describes each domain: its role, its images, and how many each class has."""
  roles = case.experiment.roles
  for name, dataset in _domains(case).items():
    role = next((role for role, names in roles.items() if name in names), 'of a stage')
    shape = 'x'.join(map(str, dataset.image_shape))
    splits = ', '.join(
      f'{split} {len(images.rows):,} ({_per_class(images, len(dataset.class_names))})'
      for split, images in dataset.every.items()
    )
    noun = 'pixels per class' if dataset.of_pixels else 'per class'
    if not dataset.has_labels:
      noun = 'no labels; per class'
    yield ok(f'{role} {name!r}: {shape}; images ({noun}): {splits}')


def _per_class(split: Split, classes: int) -> str:
  counts = split.counts(classes)
  return f'{counts.min():,} to {counts.max():,}'


def gap(case: Case) -> Findings:
  """Compares the normalised pixels of domains with those of the first."""
  found = {}
  for name, dataset in _domains(case).items():
    split, data = dataset.splits['train'], case.experiment.data[name]
    images, _ = each(split.image, sampled(split.rows))
    if not images or len({image.shape for image in images}) != 1:
      continue
    pixels = augment.unit(np.stack(images), data['unit'])
    pixels = np.asarray(augment.normalise(pixels, data['mean'], data['std']), float)
    found[name] = pixels.mean(), pixels.std()
  if not found:
    return
  (first, (mean, std)), *others = found.items()
  if others:
    yield ok(f'pixels of {first!r}: mean {mean:.3g}, deviation {std:.3g}')
  for name, (other, deviation) in others:
    yield ok(
      f'pixels of {name!r}: mean {other:.3g}, deviation {deviation:.3g}; the means are '
      f'{abs(other - mean) / max(std, 1e-12):.2g} deviations apart'
    )


def shared(case: Case) -> Findings:
  """Looks for images shared by two domains, or by a target's test and training."""
  domains = _domains(case)
  if not domains or not case.real:
    return
  pictures = {
    f'{name}/{split}': [
      Picture(f'{name}/{split}', label, images.source, row)
      for label, row in zip(images.labels.tolist(), images.rows.tolist(), strict=True)
    ]
    for name, dataset in domains.items()
    for split, images in dataset.every.items()
  }
  every = [picture for own in pictures.values() for picture in own]
  records = sum(picture.is_record() for picture in every)
  if records > HASHED and not case.thorough:
    yield odd(f'{records:,} records would be read to compare domains: give --thorough')
    return
  alike = [p for group in equal(every, Picture.size) for p in group]
  held: dict[tuple[str, str], list[tuple[Picture, Picture]]] = {}
  for group in equal(alike, Picture.digest):
    first = {picture.split: picture for picture in reversed(group)}
    for one, two in itertools.combinations(sorted(first), 2):
      held.setdefault((one, two), []).append((first[one], first[two]))
  for (one, two), both in held.items():
    domain, other = (name.rpartition('/')[0] for name in (one, two))
    hidden = domain == other and domain in case.experiment.roles[TARGET]
    if domain == other and not hidden:
      continue  # other checks cover a single labelled domain
    most = TOLERATED * min(len(pictures[one]), len(pictures[two]))
    level = wrong if len(both) > most and not hidden else odd
    yield level(
      f'images in {one} and in {two}: {len(both):,}, such as {both[0][0]} = '
      f'{both[0][1]}'
    )
  if not held:
    yield ok(f'domains share no image: {len(alike):,} of {len(every):,} were hashed')
