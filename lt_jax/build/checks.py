"""Checks of a config before anything is built: ranges, ends, impossible choices."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lt_jax.config import CLOCK, Config, flatten
from lt_jax.data.augment import UNITS
from lt_jax.errors import UserError, lookup
from lt_jax.methods import METHODS
from lt_jax.methods.supervised import make_objective

RANGES = {
  'seed': (0, 2**31 - 1),
  'batch': (1, 2**31),
  'eval_batch': (1, 2**31),
  'epochs': (0, 1e9),
  'log_every_steps': (1, 1e9),
  'save_every_epochs': (1e-9, 1e9),
  'evaluate_every_epochs': (1e-9, 1e9),
  'keep_checkpoints': (1, 1e9),
  'method.accumulate': (1, 2**31),
  'model.projection': (-1, 1e6),
  'data.seed': (0, 2**31 - 1),
  'data.known_classes': (0, 1e9),
  'data.imbalance': (1, 1e12),
  'data.test_per_class': (0, 1e9),
  'data.val_per_class': (0, 1e9),
  'data.meta_per_class': (0, 1e9),
  'data.open_val_per_class': (0, 1e9),
  'data.open_test_per_class': (0, 1e9),
  'data.size': (0, 1e4),
  'data.channels': (0, 3),
  'data.pad': (0, 256),
  'data.jitter': (0, 1),
  'data.image_size': (0, 1e4),
  'data.resize': (0, 1e4),
  'data.crop_area': (0, 1),
  'data.workers': (-1, 1e4),
  'defer_epoch': (0, 1e9),
  'sampler.start_epoch': (0, 1e9),
  'class_weights.start_epoch': (0, 1e9),
  'schedule.base': (0, 1e30),
  'method.weight': (0, 1e30),
  'penalty.weight': (0, 1e30),
}
"""Key of a config -> smallest and largest value."""

OPTION_RANGES = {
  'class_weights.beta': (0, 1),
  'loss.label_smoothing': (0, 1),
  'loss.gamma': (0, 1e6),
  'optimizer.momentum': (0, 1),
  'optimizer.b1': (0, 1),
  'optimizer.b2': (0, 1),
  'optimizer.eps': (0, 1e6),
}
"""The same for options of named functions, which check that they are numbers."""


def check_ranges(config: Config) -> None:
  """Rejects numbers without a meaning, such as a batch of no images."""
  flat = flatten(config)
  ranges = RANGES | {
    f'domains.{name}.{key.removeprefix("data.")}': most
    for name in config.get('domains', {})
    for key, most in RANGES.items()
    if key.startswith('data.')
  }
  for key, (least, most) in ranges.items():
    value = flat.get(key, least)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and least <= value <= most):  # NaN is in no range
      raise UserError(f'{key} is {value!r}; it must be from {least:g} to {most:.10g}')
  for key, (least, most) in OPTION_RANGES.items():
    value = flat.get(key)
    if isinstance(value, int | float) and not least <= value <= most:
      raise UserError(f'{key} is {value!r}; it must be from {least:g} to {most:.10g}')


def check_surgeries(surgeries: Any) -> None:
  """Rejects surgeries that are not pairs of a name and options."""
  for surgery in surgeries:
    match surgery:
      case [str(), {}]:
        pass
      case _:
        raise UserError(
          f'surgeries has {surgery!r}; each must be a name and its options, such as '
          "('copy', {'pattern': '.*', 'stage': 'train'})"
        )


def check_end(stages: Mapping[str, Config]) -> None:
  """Rejects changes scheduled after a stage has ended, which would never happen.

  Lowering the epochs does not move them, so `ldam_drw` would silently become `ldam`.
  """
  ends = {name: stage['epochs'] for name, stage in stages.items()}
  for name, stage in reversed(stages.items()):
    for operation, options in stage['surgeries']:
      if operation == 'carry' and 'step' in options.get('fields', ()):  # one clock
        origin = options.get('stage')
        ends[origin] = max(ends.get(origin, 0), ends[name])
  for name, stage in stages.items():
    end, schedule = ends[name], stage['schedule']
    epochs = {
      'class_weights.start_epoch': stage['class_weights'].get('start_epoch', 0),
      'sampler.start_epoch': math.ceil(stage['sampler'].get('start_epoch', 0)),
      'schedule.boundaries': _latest(schedule.get('boundaries')),
    }
    for key, epoch in epochs.items():
      if 0 < end <= epoch:
        raise UserError(f'{key} is at epoch {epoch:g}{_BEYOND.format(name, end)}')
    if 0 < end < _latest([schedule.get('end')]) * (1 - 1e-9):
      raise UserError(
        f'schedule.end is at epoch {schedule["end"]:g}{_BEYOND.format(name, end)}'
      )


def _latest(epochs: Any) -> float:
  """Returns the last epoch of a sequence; 0 for other values, which others reject."""
  found = epochs if isinstance(epochs, list | tuple) else []
  return max((e for e in found if isinstance(e, int | float)), default=0)


_BEYOND = (
  ', but stage {!r} ends at {:g}; to shorten the whole recipe, put epochs=... after '
  'the colon of --config'
)


def check_channels(data: Config, channels: int) -> None:
  """Rejects means and deviations that do not fit the images."""
  for key in ('mean', 'std'):
    values = data[key]
    numbers = isinstance(values, list | tuple) and all(
      isinstance(value, int | float) for value in values
    )
    if not numbers or len(values) not in (1, channels):
      many = f'one number or {channels} numbers' if channels > 1 else 'one number'
      raise UserError(
        f'data.{key} is {values!r}; it must be {many}: the images have {channels} '
        f'channel{"s" * (channels > 1)}'
      )
  if not all(value > 0 for value in data['std']):
    raise UserError(f'data.std is {data["std"]!r}; it must be positive')


def check_arrays(name: str, data: Config, dtype: str) -> None:
  """Rejects options for images on float arrays such as features, and the reverse."""
  lookup(UNITS, 'data.unit', data['unit'])
  if dtype == 'uint8':
    if data['unit'] != 'none':
      raise UserError(f'domain {name!r}: data.unit is for float arrays, not uint8')
    return
  for key in ('pad', 'flip', 'jitter'):
    if data[key]:
      raise UserError(
        f'domain {name!r} has {dtype} arrays, not images: set data.{key} to '
        f'{type(data[key])(0)!r}'
      )


def check_device(device: str) -> None:
  """Refuses to run on a CPU if an accelerator was asked for.

  If a driver is missing or busy, JAX only warns and falls back to the CPU.
  """
  backend = jax.default_backend()
  if device not in ('any', 'cpu', backend):
    raise UserError(
      f'config.device is {device!r}, but JAX found {backend!r}; '
      'set --config.device=any to run on it'
    )


def check_collapse(config: Config) -> None:
  """Rejects a loss that pulls two free networks together and never apart."""
  free = config['model']['head_options'].get('fixed', 'none') == 'none'
  attracts = config['loss'].get('name') == 'negative_score'
  if attracts and config['model']['head'] == 'two_tower' and free:
    raise UserError(
      "loss 'negative_score' only pulls an image and its class together; with both "
      'sides of two_tower free, constants minimise it, so training collapses: set '
      "model.head_options.fixed to 'classes' or 'images', or use a loss that compares "
      'classes, such as cross_entropy'
    )


def check_all_is_used(
  name: str, config: Config, wrappers: Mapping[str, Callable]
) -> None:
  """Rejects settings that a method would ignore, such as class weights or a stream.

  Args:
    name: name of the method.
    config: config of the stage.
    wrappers: name -> wrapper of the method, which may read further streams.
  """
  asked = set(inspect.signature(lookup(METHODS, 'method', name)).parameters)
  if 'objective' in asked:
    asked |= set(inspect.signature(make_objective).parameters)
  given = {
    'class_weights': (config['class_weights']['name'], 'uniform'),
    'reduction': (config['reduction'], 'mean'),
    'penalty': (config['penalty']['name'], 'none'),
    'alignment': (config['alignment']['name'], 'none'),
    'players': (', '.join(config['players']), ''),
    'heads': (', '.join(config['heads']), ''),
  }
  for key, (value, neutral) in given.items():
    if key not in asked and value != neutral:
      raise UserError(
        f'method {name!r} does not use {key}: set it to {neutral!r}, or only for the '
        f'stage that does, as stages.STAGE.{key}'
      )
  for wrapper in config['wrappers']:
    wrap = lookup(wrappers, 'wrapper', wrapper)
    asked |= {'streams'} & set(inspect.signature(wrap).parameters)
  unread = [stream for stream in config['streams'] if stream != CLOCK]
  if unread and 'streams' not in asked:
    raise UserError(f'method {name!r} does not read the stream {unread[0]!r}')
