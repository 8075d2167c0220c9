"""Times several sides within one run, in turn, and writes what was seen."""

import json
import pathlib
import platform
import statistics

import jax


def in_turn(sides, rounds, steps):
  """Returns name -> seconds a step, of each round.

  Who comes after whom changes with the round; the first round warms up.

  Args:
    sides: name -> (steps) -> seconds.
    rounds: how many are kept.
    steps: a side, a round.
  """
  seconds = {name: [] for name in sides}
  for number in range(rounds + 1):
    turn = number % len(sides)
    for name in [*sides][turn:] + [*sides][:turn]:
      taken = sides[name](steps) / steps
      if number:
        seconds[name].append(taken)
  return seconds


def ratio(seconds, base):
  """Returns the median, over the rounds, of seconds over those of a base."""
  return statistics.median(s / b for s, b in zip(seconds, base, strict=True))


def facts():
  """Returns what a report says of the machine."""
  return {
    'device': jax.devices()[0].device_kind,
    'machine': platform.machine(),
    'jax': jax.__version__,
  }


def write_report(path, report):
  """Writes a report as JSON, if there is a path."""
  if path:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + '\n')
