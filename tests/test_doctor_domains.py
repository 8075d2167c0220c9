"""What the doctor says about several domains."""

import numpy as np
import pytest

from lt_jax import doctor
from lt_jax.config import apply, base_config, open_stages, resolve
from lt_jax.recipes import apply_recipe


def write(path, rng, level, **members):
  y = np.arange(12) % 3
  x = {n: rng.integers(level, level + 50, (12, 4, 4, 1), np.uint8) for n in 'ab'}
  made = {'x_train': x['a'], 'y_train': y, 'x_test': x['b'], 'y_test': y, **members}
  np.savez(path, **made)
  return made


def found(tmp_path, **target):
  made = base_config()
  overrides = {
    'data': {'source': f'npz:{tmp_path}/one.npz', 'mean': (0.1,), 'std': (0.05,)},
    'domains': {'other': {'source': f'npz:{tmp_path}/two.npz', **target}},
    'target': ('other',),
    'batch': 8,
    'eval_batch': 8,
    'epochs': 1.0,
    'model': {'trunk': 'tiny_cnn', 'trunk_options': {'width': 4}},
  }
  apply(made, overrides)
  case = doctor.Case(resolve(open_stages(apply_recipe(made, 'source_only'))))
  sections = {'configuration': (doctor.Case.open,), 'domains': ()}
  sections['domains'] = doctor.SECTIONS['domains']
  return [finding for _, finding in doctor.examine(case, sections)]


def test_domains_are_described_and_compared(tmp_path, rng):
  one = write(tmp_path / 'one.npz', rng, 0)
  two = write(tmp_path / 'two.npz', rng, 150)
  findings = found(tmp_path)
  assert {finding.level for finding in findings} == {'ok'}
  texts = [finding.text for finding in findings]
  assert any(
    "target 'other': 4x4x1; images (per class): train 12 (4 to 4)" in t for t in texts
  )
  apart = (two['x_train'].mean() - one['x_train'].mean()) / one['x_train'].std()
  assert any(f'the means are {apart:.2g} deviations apart' in text for text in texts)
  assert any('domains share no image' in text for text in texts)


@pytest.mark.parametrize('shared', [1, 12])
def test_shared_images_are_reported(tmp_path, rng, shared):
  one = write(tmp_path / 'one.npz', rng, 0)
  x = rng.integers(0, 50, (12, 4, 4, 1), np.uint8)
  x[:shared] = one['x_train'][:shared]
  write(tmp_path / 'two.npz', rng, 0, x_test=x)
  odd, wrong = (f for f in found(tmp_path) if f.level != 'ok')
  assert (wrong.level, odd.level) == ('wrong', 'odd')
  assert f'in other/test and in source/train: {shared}, such as #' in wrong.text
  assert f'{shared} images of a target' in odd.text


def test_a_target_that_is_the_source_under_another_name(tmp_path, rng):
  write(tmp_path / 'one.npz', rng, 0)
  findings = found(tmp_path, source=f'npz:{tmp_path}/one.npz')
  (finding,) = (f for f in findings if f.level == 'wrong')
  assert "the target 'other' is the same data as 'source'" in finding.text


def test_test_images_of_a_target_that_are_trained_on_are_odd(tmp_path, rng):
  write(tmp_path / 'one.npz', rng, 0)
  write(tmp_path / 'two.npz', rng, 150)
  findings = found(tmp_path, test_split='train')
  assert {f.level for f in findings} == {'ok', 'odd'}
  odd = [finding.text for finding in findings if finding.level == 'odd']
  assert any('in other/test and in other/train: 12' in text for text in odd)
  assert any(
    "12 of the 12 test images of 'other' are among its" in text for text in odd
  )
