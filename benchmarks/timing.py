"""Times several sides in turn within one run, and writes the report."""

import json
import pathlib
import platform
import statistics

import jax


def in_turn(sides, rounds, steps):
  """Returns name -> seconds per step, in each round.

  The order of the sides rotates with each round. The first round warms up and is not
  counted.

  Args:
    sides: name -> (steps) -> seconds.
    rounds: how many rounds count.
    steps: per side and round.
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
  """Returns the median over the rounds of seconds divided by those of a base."""
  return statistics.median(s / b for s, b in zip(seconds, base, strict=True))


def facts():
  """Returns the facts about the machine that a report records."""
  return {
    'device': jax.devices()[0].device_kind,
    'machine': platform.machine(),
    'jax': jax.__version__,
  }


def write_report(path, report):
  """Writes a report as JSON, if a path is given."""
  if path:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + '\n')
