"""Learning rates as functions of the step.

A schedule is base * warm-up(step) * decay(step). Its options are in epochs: epoch e
starts at step ceil(e L / B), with L examples per epoch and batches of B.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from lt_jax.errors import UserError, construct, lookup

Schedule = Callable[[jax.Array], jax.Array]
"""Step -> learning rate, both arrays ()."""


def epoch_start(epoch: float, length: int, batch: int) -> int:
  """Returns the step at which an epoch starts: ceil(epoch * length / batch).

  Args:
    epoch: 0-based, may be fractional.
    length: examples per epoch.
    batch: examples per step.

  Examples:
    >>> epoch_start(160, length=50_000, batch=128)
    62500
  """
  # Via the decimal string, so that 0.1 is a tenth and the division is exact.
  return math.ceil(Fraction(str(epoch)) * Fraction(length, batch))


def constant(epoch_steps: Fraction) -> Schedule:
  """The learning rate does not decay.

  Args:
    epoch_steps: steps per epoch; not used.

  Examples:
    >>> constant(Fraction(10))(np.array([0, 99])).tolist()
    [1.0, 1.0]
  """
  del epoch_steps
  return lambda step: jnp.ones(jnp.shape(step), jnp.float32)


def step_decay(
  epoch_steps: Fraction, *, boundaries: Sequence[float], factors: Sequence[float]
) -> Schedule:
  """Multiplies the base by a factor from each boundary on.

  Args:
    epoch_steps: steps per epoch, may be fractional.
    boundaries: 0-based epochs, increasing.
    factors: multiples of the base from each boundary on, not of the previous factor.

  Returns:
    step -> float32 multiplier.

  Raises:
    UserError: boundaries do not increase, or there is not one factor per boundary.

  Examples:
    >>> decay = step_decay(Fraction(10), boundaries=(2,), factors=(0.5,))
    >>> decay(np.array([0, 19, 20])).tolist()
    [1.0, 1.0, 0.5]
  """
  if len(boundaries) != len(factors):
    raise UserError(
      f'step_decay needs one factor per boundary, got {len(boundaries)} boundaries '
      f'and {len(factors)} factors'
    )
  if sorted(set(boundaries)) != list(boundaries):
    raise UserError(f'step_decay needs increasing boundaries, got {tuple(boundaries)}')
  return _piecewise(epoch_steps, boundaries, [1.0, *factors])


def cosine(epoch_steps: Fraction, *, end: float, begin: float = 0) -> Schedule:
  r"""Half a period of a cosine, from the base to zero, step by step.

  .. math::
    \tfrac12 (1 + \cos \pi r), \qquad r = \frac{e - begin}{end - begin}

  Args:
    epoch_steps: steps per epoch, may be fractional.
    end: epoch at which zero is reached, usually the end of training.
    begin: epoch at which the decay starts, usually the end of the warm-up.

  Returns:
    step -> float32 multiplier.

  Raises:
    UserError: `end` is not after `begin`.

  Examples:
    >>> cosine(Fraction(10), end=4)(np.array([0, 20, 40])).round(3).tolist()
    [1.0, 0.5, 0.0]

  Loshchilov and Hutter, ICLR 2017, arXiv 1608.03983, without restarts.
  """
  if not end > begin:
    raise UserError(f'cosine needs end > begin, got end {end} and begin {begin}')
  ramp = _ramp(float(begin * epoch_steps), float(end * epoch_steps))
  return lambda step: 0.5 * (1 + jnp.cos(jnp.pi * ramp(step)))


def dann(
  epoch_steps: Fraction, *, end: float, alpha: float = 10.0, beta: float = 0.75
) -> Schedule:
  r"""Decays by a power of the progress p, which is 0 at step 0 and 1 at the end.

  .. math::
    (1 + \alpha p)^{-\beta}

  Args:
    epoch_steps: steps per epoch, may be fractional.
    end: epoch at which p is 1, usually the end of training.
    alpha: the larger, the earlier the decay.
    beta: power of the decay.

  Returns:
    step -> float32 multiplier.

  Raises:
    UserError: `end` is not positive, or alpha is negative.

  Examples:
    >>> decay = dann(Fraction(10), end=4, alpha=15.0, beta=0.5)
    >>> decay(np.array([0, 8, 40])).round(3).tolist()  # 1, 1 / sqrt(4), 1 / sqrt(16)
    [1.0, 0.5, 0.25]

  Ganin et al., JMLR 17(59), 2016, arXiv 1505.07818, section 5.2.2. Other code uses
  (1 + 0.001 step)^-0.75, which is the same for a training of 10,000 steps.
  """
  if not end > 0 or alpha < 0:
    raise UserError(
      f'dann needs end > 0 and alpha >= 0, got end {end} and alpha {alpha}'
    )
  progress = _ramp(0.0, float(end * epoch_steps))
  return lambda step: (1 + alpha * progress(step)) ** -beta


def curriculum(
  epoch_steps: Fraction,
  *,
  end: float,
  first: float = 0.5,
  power: float = 0.3,
  full: float = 0.85,
) -> Schedule:
  r"""Rises epoch by epoch with the share of the images that a curriculum uses.

  .. math::
    r_0 + (1 - r_0) \Big( \frac{e}{0.85\, end} \Big)^{power}

  which is a little more than 1 in the last epochs, as in the authors' code.

  Args:
    epoch_steps: steps per epoch, may be fractional.
    end: epochs of training.
    first: r0, the share in the first epoch.
    power: the smaller, the faster the share rises at first.
    full: fraction of the epochs after which all images are used, 0.85 above.

  Returns:
    step -> float32 multiplier.

  Raises:
    UserError: a value is out of range.

  Examples:
    >>> rise = curriculum(Fraction(10), end=2, power=1.0, full=1.0)
    >>> rise(np.array([0, 9, 10])).tolist()  # 0.5 + 0.5 * 1 / 2 in epoch 1
    [0.5, 0.5, 0.75]

  Liu et al., arXiv 1909.03403, the authors' code; the options are those of
  `lt_jax.data.samplers.curriculum`.
  """
  if not (end > 0 and 0 < first <= 1 and power > 0 and 0 < full <= 1):
    raise UserError(
      f'schedule curriculum: end {end} and power {power} must be positive, first '
      f'{first} and full {full} in (0, 1]'
    )
  epochs = range(math.ceil(end))
  shares = [first + (1 - first) * (e / (full * end)) ** power for e in epochs]
  return _piecewise(epoch_steps, epochs[1:], shares)


def poly(
  epoch_steps: Fraction, *, end: float, power: float = 0.9, part: float = 1.0
) -> Schedule:
  r"""Decays by a power of the remaining training, to 0 at the end and after it.

  .. math::
    (1 - s t / T)^\kappa

  Args:
    epoch_steps: steps per epoch, may be fractional.
    end: epoch T.
    power: kappa.
    part: s, how far the decay gets by then. ADVENT's decay is for 250,000 steps, of
      which 120,000 are trained, so its part is 0.48.

  Returns:
    step -> float32 multiplier.

  Raises:
    UserError: `end` or the power is not positive, or the part not in (0, 1].

  Examples:
    >>> poly(Fraction(10), end=4, power=2.0)(np.array([0, 20, 40])).tolist()
    [1.0, 0.25, 0.0]

  Chen et al., DeepLab-v2, arXiv 1606.00915, section 4.1.2, there "poly".
  """
  if not end > 0 or not power > 0:
    raise UserError(f'poly needs end > 0 and power > 0, got {end} and {power}')
  if not 0 < part <= 1:
    raise UserError(f'poly needs a part in (0, 1], got {part}')
  progress = _ramp(0.0, float(end * epoch_steps))
  return lambda step: (1 - part * progress(step)) ** power


SCHEDULES = {
  'constant': constant,
  'step_decay': step_decay,
  'cosine': cosine,
  'dann': dann,
  'curriculum': curriculum,
  'poly': poly,
}


def linear_warmup(epoch_steps: Fraction, epochs: float) -> Schedule:
  """Rises from 0 at step 0 to 1 at the end of the warm-up, step by step.

  Args:
    epoch_steps: steps per epoch, may be fractional.
    epochs: length of the warm-up.

  Returns:
    step -> float32 multiplier.

  Examples:
    >>> linear_warmup(Fraction(10), epochs=4)(np.array([0, 20, 40])).tolist()
    [0.0, 0.5, 1.0]

  As in Cui et al.'s code (richardaecn/class-balanced-loss).
  """
  return _ramp(0.0, float(epochs * epoch_steps))


def staircase_warmup(epoch_steps: Fraction, epochs: int) -> Schedule:
  """Multiplies by (e + 1) / epochs in each 0-based epoch e of the warm-up.

  Args:
    epoch_steps: steps per epoch, may be fractional.
    epochs: length of the warm-up, a whole number.

  Returns:
    step -> float32 multiplier.

  Raises:
    UserError: `epochs` is not a whole number.

  Examples:
    >>> staircase_warmup(Fraction(10), epochs=4)(np.array([0, 20, 40])).tolist()
    [0.25, 0.75, 1.0]

  As in Cao et al.'s code (kaidic/LDAM-DRW).
  """
  if epochs != int(epochs):
    raise UserError(f'staircase warm-up needs whole epochs, got {epochs}')
  stairs = [(e + 1) / epochs for e in range(int(epochs))]
  return _piecewise(epoch_steps, range(1, int(epochs)), stairs)


WARMUPS = {'linear': linear_warmup, 'staircase': staircase_warmup}


def make_schedule(
  name: str,
  base: float,
  *,
  length: int,
  batch: int,
  warmup: str = 'linear',
  warmup_epochs: float = 0,
  **options: Any,
) -> Schedule:
  """Returns a learning rate as a function of the step: base * warm-up * decay.

  Cui et al. on long-tailed CIFAR: `make_schedule('step_decay', 0.1, length=L,
  batch=128, warmup='linear', warmup_epochs=5, boundaries=(160, 180),
  factors=(1e-2, 1e-4))`; Cao et al. (LDAM-DRW): the same with `warmup='staircase'`.

  Args:
    name: a key of `SCHEDULES`.
    base: learning rate after the warm-up and before the decay.
    length: examples per epoch; with `length == batch` an epoch is one step.
    batch: examples per step.
    warmup: a key of `WARMUPS`.
    warmup_epochs: length of the warm-up, 0 for none.
    **options: options of the schedule, in epochs.

  Returns:
    step (int32, any shape) -> float32 of that shape.

  Raises:
    UserError: a name or option is unknown, or a value is out of range.

  Examples:
    >>> rate = make_schedule('cosine', 0.5, length=1000, batch=100, end=4)
    >>> rate(np.array([0, 20, 40])).round(3).tolist()
    [0.5, 0.25, 0.0]
  """
  epoch_steps = Fraction(length, batch)
  decay = construct(SCHEDULES, 'schedule', name, epoch_steps, options=options)
  warm_up = lookup(WARMUPS, 'warm-up', warmup)
  if warmup_epochs < 0:
    raise UserError(f'warmup_epochs cannot be negative, got {warmup_epochs}')
  if not warmup_epochs:
    return lambda step: base * decay(step)
  rise = warm_up(epoch_steps, warmup_epochs)
  return lambda step: base * rise(step) * decay(step)


def _piecewise(
  epoch_steps: Fraction, boundaries: Iterable[float], values: Sequence[float]
) -> Schedule:
  """Returns values[k] between the k-th and the next boundary, given in epochs."""
  starts = [
    epoch_start(epoch, epoch_steps.numerator, epoch_steps.denominator)
    for epoch in boundaries
  ]

  def value(step: jax.Array) -> jax.Array:
    passed = [jnp.asarray(step) >= start for start in starts]
    index = sum(passed, jnp.zeros(jnp.shape(step), jnp.int32))
    return jnp.asarray(values, jnp.float32)[index]

  return value


def _ramp(begin: float, end: float) -> Schedule:
  """Returns a rise from 0 at step `begin` to 1 at step `end`, clipped outside."""
  return lambda step: jnp.clip(
    (jnp.asarray(step, jnp.float32) - begin) / (end - begin), 0, 1
  )
