"""From config keys to domains: their data, roles and pixels."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lt_jax.build.checks import check_arrays, check_channels
from lt_jax.config import (
  OPEN,
  SOURCE,
  TARGET,
  Config,
  domain_data,
  domains_of_stages,
)
from lt_jax.data import augment
from lt_jax.data.dataset import Dataset, load_dataset
from lt_jax.data.domains import (
  check_alike,
  check_of_pixels,
  have_one_label_space,
  joined,
  seen_through,
  shared,
  united,
)
from lt_jax.errors import UserError, check_options, lookup

NOT_LOADING = (
  'mean',
  'std',
  'standardise',
  'unit',
  'pad',
  'pad_mode',
  'flip',
  'jitter',
  'many_shot',
  'few_shot',
  'same_classes',
  'pretrain_classes',
  'workers',
  'on_bad_image',
)
"""Keys of `data` that apply to images after loading."""

OF_READING = (
  'image_size',
  'resize',
  'crop_area',
  'window',
  'scale',
  'resize_to',
  'on_bad_image',
)
"""Keys of `data` that say how images are read and cropped; one stream has one way."""

Transforms = tuple[Callable, Callable]


class Domains(NamedTuple):
  """The domains of a run, by name and by role.

  Attributes:
    datasets: name or role -> data set; a role of several domains joins them.
    data: name or role -> keys of `data`.
    roles: 'source', 'target' and 'open' -> names of the domains.
    transforms: name or role -> pixel transforms for (training, evaluation).
    sharing: labelled domain -> how many images of a target it has too.
  """

  datasets: dict[str, Dataset]
  data: dict[str, Config]
  roles: dict[str, tuple[str, ...]]
  transforms: dict[str, Transforms]
  sharing: dict[str, int]

  def dataset(self, name: str) -> Dataset:
    """Returns the data of a domain or of a role."""
    if self.roles.get(name) == ():
      raise UserError(f'there is no {name} domain: set config.{name}')
    return lookup(self.datasets, 'domain', name)

  def is_target(self, name: str) -> bool:
    """Returns whether the labels of a domain are those of a target."""
    return name == TARGET or name in self.roles[TARGET]

  @property
  def single(self) -> dict[str, Dataset]:
    """The domains themselves, without the roles that join them."""
    joins = {role for role, members in self.roles.items() if members != (role,)}
    return {name: data for name, data in self.datasets.items() if name not in joins}


def load_domains(
  config: Config,
  *,
  to_device: Callable[[np.ndarray], Any],
  given: Mapping[str, Dataset] | None = None,
) -> Domains:
  """Loads every domain that has a role.

  Args:
    config: the resolved config.
    to_device: puts images of small sources into device memory.
    given: domain or role -> data set to use instead of the one in the config.

  Raises:
    UserError: a domain does not exist or has two roles, domains used together differ
      in classes or image shape, or a target has the images of a source.
  """
  roles = _roles(config)
  meeting = list(dict.fromkeys(name for members in roles.values() for name in members))
  alone = [name for name in domains_of_stages(config) if name not in (*meeting, *roles)]
  configs = {name: domain_data(config, name) for name in (*meeting, *alone)}
  datasets = dict(given or {})
  for name, data in configs.items():
    if name not in datasets:
      loading = {key: v for key, v in data.items() if key not in NOT_LOADING}
      check_options('data', load_dataset, loading, 'to_device')
      datasets[name] = load_dataset(**loading, to_device=to_device)
    check_arrays(name, data, datasets[name].dtype)
    check_channels(data, datasets[name].image_shape[-1])
    configs[name] = data | _standard(name, datasets[name], data)
  meet = {name: datasets[name] for name in meeting if datasets[name].class_names}
  unlabelled = [name for name in configs if not datasets[name].class_names]
  _check_only_targets(unlabelled, roles, configs)
  of_pixels = any(one.of_pixels for one in meet.values())
  if of_pixels:
    check_of_pixels(meet)
    if unlabelled:
      raise UserError(
        f'domain {unlabelled[0]!r}: {configs[unlabelled[0]]["source"]!r} has images '
        "alone, but others have label maps: name its images in a list, each with '-'"
      )
  elif not have_one_label_space({name: meet[name] for name in roles[SOURCE]}):
    same = {name: _same_classes(name, configs[name]) for name in meeting}
    meet = united(meet, roles[SOURCE], same)
    datasets |= {name: one for name, one in meet.items() if name not in roles[SOURCE]}
  for name in unlabelled:
    datasets[name] = _with_classes(datasets[name], meet[roles[SOURCE][0]])
    meet[name] = datasets[name]
  check_alike(meet, sizes=not of_pixels)
  sharing: dict[str, int] = {}
  if not given:
    labelled = {name: datasets[name] for name in (*roles[SOURCE], *alone)}
    sharing = _sharing({n: meet[n] for n in roles[TARGET]}, labelled, configs)
  for role, members in roles.items():
    if role == OPEN or not members:
      continue
    configs[role] = configs[members[0]]
    _check_pixels(role, members, configs)
    if members != (role,) and role not in (given or {}):
      parts = {name: meet[name] for name in members}
      datasets[role] = joined(parts) if len(parts) > 1 else parts[members[0]]
      for number, name in enumerate(members if len(parts) > 1 else ()):
        datasets[name] = seen_through(datasets[name], datasets[role], number)
  made = {name: make_transforms(data) for name, data in configs.items()}
  return Domains(datasets, configs, roles, made, sharing)


def _roles(config: Config) -> dict[str, tuple[str, ...]]:
  """Returns role -> its domains; each domain has one role."""
  roles = {
    SOURCE: tuple(config['sources']) or (SOURCE,),
    TARGET: tuple(config['target']),
    OPEN: tuple(config['open_domains']),
  }
  for name in config['domains']:
    if name in roles:
      raise UserError(
        f'domains.{name}: this is the name of a role; choose another name'
      )
  seen: dict[str, str] = {}
  for role, members in roles.items():
    for name in members:
      if name == SOURCE and roles[SOURCE] != (SOURCE,):
        raise UserError(
          f'{role} has the domain {SOURCE!r}, which is `data` where there is no other '
          'source: describe it under domains by another name'
        )
      if name in seen:
        raise UserError(f'domain {name!r} is both {seen[name]} and {role}')
      if name != SOURCE:
        lookup(config['domains'], 'domain', name)
      seen[name] = role
  return roles


def _check_only_targets(
  unlabelled: Sequence[str],
  roles: Mapping[str, Sequence[str]],
  configs: Mapping[str, Config],
) -> None:
  """Refuses images without classes, unless they are those of all targets."""
  for name in unlabelled:
    source = configs[name]['source']
    if name not in roles[TARGET]:
      raise UserError(
        f'domain {name!r}: {source!r} has images but no folders of classes, which only '
        'a target can do without: make CLASS/*.jpg or train/CLASS/*.jpg'
      )
    others = [one for one in roles[TARGET] if one not in unlabelled]
    if others:
      raise UserError(
        f'targets {name!r} and {others[0]!r} are one target, but only the second has '
        'classes: give both class folders, or neither'
      )


def _with_classes(dataset: Dataset, source: Dataset) -> Dataset:
  """Returns an unlabelled data set with the classes of a source."""
  return dataset._replace(
    class_names=source.class_names,
    counts=np.zeros_like(source.counts),
    described=source.described,
    unseen=source.unseen,
    val_classes=source.val_classes,
  )


def _standard(name: str, dataset: Dataset, data: Config) -> dict[str, Any]:
  """Returns `mean` and `std` of a domain's training images if `standardise` is set.

  No label is read. A constant channel gets the deviation 1.

  Raises:
    UserError: the images are not in memory.
  """
  split = dataset.splits['train']
  if (
    not data['standardise'] or split.source is None
  ):  # opened without its data, to predict
    return {}
  images = getattr(split.source, 'images', None)
  if images is None:
    raise UserError(
      f'domain {name!r}: data.standardise needs images in memory: set data.mean and '
      'data.std instead'
    )
  mean, std = augment.moments(images[split.rows], data['unit'])
  return {'mean': mean.tolist(), 'std': std.tolist()}


def _same_classes(name: str, data: Config) -> dict[str, str]:
  """Returns class of a domain -> its name in the union of label spaces."""
  for pair in data['same_classes']:
    match pair:
      case [str(), str()]:
        pass
      case _:
        raise UserError(
          f'domain {name!r}: data.same_classes has {pair!r}; each entry must be a '
          'class of the domain and its name in the union'
        )
  return {ours: name for ours, name in data['same_classes']}


def _check_pixels(
  role: str, members: Sequence[str], configs: Mapping[str, Config]
) -> None:
  """Rejects domains of one role whose pixels would be treated differently."""
  first = configs[members[0]]
  if len(members) > 1 and any(configs[name]['standardise'] for name in members):
    names = ' and '.join(map(repr, members))
    raise UserError(
      f'domains {names} are one {role}, but data.standardise works only for a single '
      'domain: set data.mean and data.std instead'
    )
  for name in members[1:]:
    for key in (*NOT_LOADING[:8], *OF_READING):
      if configs[name][key] != first[key]:
        raise UserError(
          f'domains {members[0]!r} and {name!r} are one {role} and must agree in '
          f'data.{key}: {first[key]!r} and {configs[name][key]!r}'
        )


def _sharing(
  targets: Mapping[str, Dataset],
  labelled: Mapping[str, Dataset],
  configs: Mapping[str, Config],
) -> dict[str, int]:
  """Returns labelled domain -> how many images of targets, of any split, it has too.

  Args:
    targets: name -> data.
    labelled: likewise, the sources, and domains of stages and streams without a role.
    configs: name -> keys of `data`.

  Raises:
    UserError: a target is a labelled domain once more, whatever its name or path.
  """
  counts = dict.fromkeys(labelled, 0)
  for target, source in itertools.product(targets, labelled):
    if configs[target]['source'] == 'fake':  # all generated domains share their images
      continue
    theirs = [*labelled[source].every.values()]
    found = {name: shared(one, theirs) for name, one in targets[target].every.items()}
    images = targets[target].splits['train']
    if found['train'] == len(images.rows) > 0:
      raise UserError(
        f'the target {target!r} is the same data as {source!r}, whose labels are '
        f'learned: all its {len(images.rows):,} training images are there too; name '
        f'other data in domains.{target}.source'
      )
    counts[source] += sum(found.values())
  return {name: number for name, number in counts.items() if number}


def make_transforms(data: Config) -> Transforms:
  """Returns (training, evaluation): the transforms of pixels on the device."""
  mean, std, unit = data['mean'], data['std'], data['unit']
  pad, pad_mode, flip = data['pad'], data['pad_mode'], data['flip']
  jitter = data['jitter']
  lookup(augment.PAD_MODES, 'pad_mode', pad_mode)

  def plain(key, batch):
    del key
    images = augment.normalise(augment.unit(batch['image'], unit), mean, std)
    return {**batch, 'image': images}

  def augmented(key, batch):
    most = augment.white(batch['image'])  # before jitter turns them into floats
    crop_key, flip_key = jax.random.split(key)
    jitter_key = jax.random.fold_in(key, 1)
    if pad:
      batch = augment.with_maps(
        lambda x: augment.pad_crop(crop_key, x, pad=pad, mode=pad_mode), batch
      )
    if flip:
      batch = augment.with_maps(lambda x: augment.flip(flip_key, x), batch)
    images = batch['image']
    if jitter:
      images = augment.colour_jitter(jitter_key, images, strength=jitter)
    images = augment.normalise(augment.unit(images, unit), mean, std, most)
    return {**batch, 'image': images}

  return augmented, plain
