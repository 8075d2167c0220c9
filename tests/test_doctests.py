"""The examples in the docstrings of pure functions return what they say."""

import doctest
import importlib
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

MODULES = (
  'class_weights',
  'data.longtail',
  'data.samplers',
  'evals.calibration',
  'evals.classification',
  'evals.closed_set',
  'evals.domains',
  'evals.label_free',
  'evals.label_shift',
  'evals.multitask',
  'evals.open_set',
  'evals.openmax',
  'evals.ordering',
  'evals.probing',
  'evals.segmentation',
  'evals.similarity',
  'evals.transferability',
  'evals.zero_shot',
  'losses',
  'losses.alignment',
  'losses.classification',
  'losses.margin',
  'losses.metric',
  'losses.ranking',
  'losses.tasks',
  'optim',
  'schedules',
)


@pytest.mark.parametrize('name', MODULES)
def test_examples_are_true(name):
  """Each is complete, except for `np`, `jnp` and the names in its own module."""
  module = importlib.import_module(f'lt_jax.{name}')
  failed, tried = doctest.testmod(module, extraglobs={'np': np, 'jnp': jnp})
  assert tried and not failed, 'the output above names the example'


def public_functions(family):
  """Yields the public functions in a dict, including those inside named tuples."""
  for entry in family.values():
    for one in entry if isinstance(entry, tuple) else (entry,):
      if inspect.isfunction(one) and not one.__name__.startswith(('_', '<')):
        yield one


def test_each_function_that_has_a_name_in_a_config_has_an_example():
  parser, without, found = doctest.DocTestParser(), set(), set()
  for name in MODULES:
    for attribute, value in vars(importlib.import_module(f'lt_jax.{name}')).items():
      if attribute.isupper() and isinstance(value, dict):
        for function in public_functions(value):
          found.add(function.__name__)
          if not parser.get_examples(inspect.getdoc(function)):
            without.add(f'{function.__module__}.{function.__name__}')
  assert {'balanced_softmax', 'coral', 'class_aware', 'leep', 'cosine'} <= found
  assert not without, 'add an "Examples:" section to their docstrings'
