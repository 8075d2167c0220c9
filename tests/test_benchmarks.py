"""Benchmarks start; those that are quick run, on next to nothing."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from tests import child

NAMES = (
  'epoch',
  'input_pipeline',
  'memory_head',
  'meta_step',
  'tables',
  'train_step',
)


@pytest.mark.parametrize('name', NAMES)
def test_it_says_what_it_takes(name, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', [name, '--help'])
  with pytest.raises(SystemExit) as ended:
    importlib.import_module(f'benchmarks.{name}').main()
  assert ended.value.code == 0
  assert '--' in capsys.readouterr().out


SMALL = {
  'train_step': '--net=resnet8 --batch=8 --steps=2 --rounds=1',
  'train_step, host stream': '--net=resnet10 --size=48 --batch=8 --steps=2 --rounds=1',
  'meta_step': '--net=resnet8 --steps=4 --rounds=1',
  'memory_head': '--sizes 20 --rounds=1',
}


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
def test_it_runs(name, tmp_path):
  path = tmp_path / 'found.json'
  command = [sys.executable, '-m', f'benchmarks.{name.partition(",")[0]}']
  command += [*SMALL[name].split(), f'--json={path}']
  done = subprocess.run(
    command, cwd=child.ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(path.read_text())


@pytest.mark.slow
def test_a_table_holds_what_its_runs_found(tmp_path, monkeypatch):
  from benchmarks import tables

  monkeypatch.setattr(tables, 'ROOT', tmp_path)
  for folder in ('configs', 'lt_jax'):
    (tmp_path / folder).symlink_to(child.ROOT / folder)
  table = tables.Sweep('digits_lt.py:epochs=6', 'ce,mwn', '0,1')
  monkeypatch.setitem(tables.TABLES, 'digits_lt', table)
  option = '--config.model.trunk=tiny_cnn'
  given = ['tables', 'digits_lt', f'--workdir={tmp_path}/runs', '--', option]
  monkeypatch.setattr(sys, 'argv', given)
  cores = os.sched_getaffinity(0)
  with pytest.raises(SystemExit) as ended:
    tables.main()
  assert ended.value.code == 0 and os.sched_getaffinity(0) == cores
  found = json.loads((tmp_path / 'results/digits_lt.json').read_text())
  assert [row['recipe'] for row in found['rows']] == ['ce', 'mwn']
  ce, mwn = found['rows']
  assert ce['seeds'] == [0, 1] and ce['learned_over_prior'] == [None, None]
  assert all(value > 0 for value in mwn['learned_over_prior'])
  assert ce['command'] == (
    'python -m lt_jax.main --config=configs/digits_lt.py:ce,epochs=6 '
    f'{option} --config.seed=SEED --workdir=DIR'
  )
  result = json.loads((tmp_path / 'runs/ce/1/result.json').read_text())
  assert ce['test']['accuracy'][1] == result['test']['accuracy']
