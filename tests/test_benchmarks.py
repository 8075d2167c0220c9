"""Benchmarks start, and quick ones run, on tiny inputs."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.digests import compared
from configs import cifar10_lt
from lt_jax import files
from lt_jax.config import config_digest, resolve
from lt_jax.errors import UserError
from lt_jax.models import convolution, make_classifier
from lt_jax.sweep import _value, at_point, cells, loader, parse_grid
from tests import child

NAMES = (
  'adaptation_step',
  'depthwise',
  'digests',
  'effective_number',
  'epoch',
  'input_pipeline',
  'layers',
  'memory_head',
  'meta_step',
  'segmentation_step',
  'pairs',
  'probe',
  'tables',
  'train_step',
  'two_component',
  'which_source',
  'zero_shot',
)


SMALL = {
  'train_step': '--net=resnet8 --batch=8 --steps=2 --rounds=1',
  'train_step, host stream': '--net=resnet10 --size=48 --batch=8 --steps=2 --rounds=1',
  'meta_step': '--net=resnet8 --steps=4 --rounds=1',
  'memory_head': '--sizes 20 --rounds=1',
  'adaptation_step': '--batch=4 --steps=2 --rounds=1',
  'segmentation_step': '--batch=1 --height=32 --width=48 --steps=2 --rounds=1',
  'depthwise': '--batch=2 --size=32 --rounds=1',
  'zero_shot': '--images=200 --features=12 --rounds=1',
  'probe': '--images=60 --features=20 --classes=3 --rounds=1 --within=1e-3',
}


@pytest.mark.parametrize('name', NAMES)
def test_help_says_what_it_takes(name, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', [name, '--help'])
  with pytest.raises(SystemExit) as ended:
    importlib.import_module(f'benchmarks.{name}').main()
  assert ended.value.code == 0
  said = capsys.readouterr().out
  assert '--' in said
  assert '--json' in said or name not in SMALL


def test_the_replaced_depthwise_convolution_computes_the_same(rng):
  from benchmarks.depthwise import by_xla

  x = jnp.asarray(rng.normal(size=(1, 5, 5, 2)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(3, 3, 1, 2)), jnp.float32)
  given = {'stride': 1, 'padding': ((2, 2), (2, 2)), 'dilation': 2}
  own = convolution._shifted_products(x, kernel, **given)
  np.testing.assert_allclose(by_xla(True)(x, kernel, **given), own, atol=1e-5)


def test_a_draw_by_layer_tests_on_images_that_it_does_not_learn_from(monkeypatch, rng):
  from benchmarks import layers
  from lt_jax.evals import probing
  from lt_jax.surgeries import classifiers

  labels = np.repeat(np.arange(3), 8)
  number = np.arange(len(labels), dtype=np.float64)[:, None]  # tells images apart
  fits, real = [], classifiers.chosen

  def chosen(kind, x, labels, classes, *, strengths):
    fits.append((x, strengths, real(kind, x, labels, classes, strengths=strengths)))
    return fits[-1][2]

  monkeypatch.setattr(classifiers, 'chosen', chosen)
  monkeypatch.setattr(classifiers, 'scaling', lambda x: lambda x: x)
  found = layers.accuracies('svm', probing.Images(number, labels), 2, draws=3, most=5)
  first, *others = fits
  assert first[1] == () and found['strength'] == first[2].strength
  assert all(strengths == (found['strength'],) for _, strengths, _ in others)
  assert len({tuple(x.ravel()) for x, _, _ in fits}) == 3
  for draw, (x, _, fit) in enumerate(fits):
    place = probing.places_in_class(labels, draw)
    np.testing.assert_array_equal(x, number[place < 2])
    predicted = fit.classifier(number).argmax(1)
    right = [
      (predicted == labels)[(labels == label) & (place >= 5)].mean()
      for label in range(3)
    ]
    assert found['accuracy'][draw] == pytest.approx(np.mean(right))


def write_domains(path, rng, each=8):
  """Writes features of three domains with three classes, each image once."""
  labels = np.repeat(np.arange(3), each)
  arrays = {}
  for shift, name in enumerate('abc'):
    x = rng.normal(size=(len(labels), 6)) + 3 * np.eye(6)[labels] + shift
    arrays |= {f'x_{name}': x.astype(np.float32), f'y_{name}': labels}
  np.savez(path, **arrays)


def test_domains_of_a_file_are_checked(tmp_path, rng):
  from benchmarks import which_source

  file = tmp_path / 'found.npz'
  write_domains(file, rng)
  one = which_source.opened(f'd={file}:b', tmp_path)
  assert (one.name, one.pool.features.shape) == ('d', (24, 6))
  assert one.digest != which_source.opened(f'd={file}:c', tmp_path).digest
  write_domains(tmp_path / 'small.npz', rng, each=5)
  for argument, message in (
    ('a', 'is not DOMAIN=FILE'),
    (f'a={tmp_path}/none.npz', 'there is no file'),
    (f'd={file}', "has no array 'x_d_train"),
    (f'a={tmp_path}/small.npz', 'a class has 5 images'),
  ):
    with pytest.raises(UserError, match=message):
      which_source.opened(argument, tmp_path)


@pytest.mark.slow
def test_sources_are_ranked(tmp_path, rng, monkeypatch, capsys):
  from benchmarks import which_source

  file = tmp_path / 'found.npz'
  write_domains(file, rng)
  changes = {'FEATURE_STEPS': 20, 'SEEDS': (0,), 'RESULTS': tmp_path / 'found.json'}
  for name, value in changes.items():
    monkeypatch.setattr(which_source, name, value)
  named = [f'{name}={file}' for name in 'abc']
  command = ['which_source', *named, f'--workdir={tmp_path / "work"}']
  monkeypatch.setattr(sys, 'argv', command)
  with pytest.raises(SystemExit) as ended:
    which_source.main()
  assert ended.value.code == 0, capsys.readouterr()
  found = json.loads((tmp_path / 'found.json').read_text())
  assert len(found['rows']) == 6 and set(found['controls']) == set('abc')
  assert all(0 <= row['accuracy'] <= 1 for row in found['rows'])
  monkeypatch.setattr(sys, 'argv', [*command[:3], command[-1]])
  with pytest.raises(SystemExit) as ended:
    which_source.main()
  assert ended.value.code == 2


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


def test_arrays_are_compared_under_the_paths_they_had():
  bias, step = [[3], 'float32', 'ab'], [[], 'int32', 'cd']
  ours = {'1': {'opt.net.inner_state.trace.bias': bias, 'step': step}}
  theirs = {'opt.net.inner_state.trace.net.bias': bias, 'step': step}
  assert compared(ours, {'1': theirs}) == '2 arrays equal, 1 renamed'
  for other in ({'step': bias}, {'more': bias}, {'params.net.bias': bias}):
    assert not compared(ours, {'1': theirs | other})
  assert not compared(ours, {'1': {'step': step}}) and not compared(ours, {})


def test_a_side_of_another_size_is_rejected(tmp_path):
  from benchmarks.train_step import Torch

  python = tmp_path / 'python'
  python.write_text('#!/bin/sh\necho ready torch 2.0 cpu 77000\nread line\n')
  python.chmod(0o755)
  same = Torch(python, 'resnet8', 77000, 8)
  same.process.communicate()
  assert same.version == '2.0'
  with pytest.raises(SystemExit, match=r'resnet10 has 5,418,792 .* 77,000'):
    Torch(python, 'resnet10', 5418792, 8)


@pytest.mark.parametrize(
  ('net', 'expected'),
  [('resnet8', 75290), ('resnet10', 5418792), ('resnet50', 25557032)],
)
def test_the_networks_of_both_sides_have_one_size(net, expected):
  pytest.importorskip('torch')
  from benchmarks import torch_step

  photographs = net in torch_step.PHOTOGRAPHS
  made = torch_step.photographs(net) if photographs else torch_step.resnet(8)
  assert sum(p.numel() for p in made.parameters()) == expected


@pytest.mark.parametrize('network', ['small', 'deeplab_resnet50'])
def test_networks_of_pixels_have_one_size_on_both_sides(network):
  pytest.importorskip('torch')
  from benchmarks import segmentation_step, torch_segmentation_step

  case = segmentation_step.CASES[network]
  net = make_classifier(num_classes=case.classes, per_pixel=True, **case.parts)
  shapes = jax.eval_shape(
    lambda: net.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
  )['params']
  made, classes = torch_segmentation_step.NETWORKS[network]
  theirs = sum(p.numel() for p in made(classes).parameters())
  assert sum(x.size for x in jax.tree.leaves(shapes)) == theirs


@pytest.fixture
def make_table(tmp_path, monkeypatch, capsys):
  """Makes the table of two methods and two seeds: options -> (exit code, its file)."""
  from benchmarks import tables

  monkeypatch.setattr(tables, 'ROOT', tmp_path)
  for folder in ('configs', 'lt_jax'):
    (tmp_path / folder).symlink_to(child.ROOT / folder)
  table = tables.Sweep('digits_lt.py:epochs=6', 'ce,mwn', '0,1')
  monkeypatch.setitem(tables.TABLES, 'digits_lt', table)

  def make(*options):
    given = ['tables', 'digits_lt', f'--workdir={tmp_path}/runs', '--', *options]
    monkeypatch.setattr(sys, 'argv', given)
    with pytest.raises(SystemExit) as ended:
      tables.main()
    captured = capsys.readouterr()
    if captured.err:
      return ended.value.code, captured.err
    path = pathlib.Path(captured.out.split()[-1])
    return ended.value.code, json.loads(path.read_text())

  return make


@pytest.fixture
def swept(monkeypatch):
  """A sweep that trains nothing and records the command it would run."""
  from benchmarks import tables

  seen = []

  def sweep(chosen, workdir):
    seen.append(chosen)
    keys = dict(w[9:].split('=') for w in chosen.options if w.startswith('--config.'))
    path, _, options = chosen.config.partition(':')
    make = loader(f'{child.ROOT}/configs/{path}', options, keys)
    for cell in cells(chosen.methods.split(','), chosen.seeds.split(','), workdir):
      config = {**resolve(make(cell.method)), 'seed': cell.seed}
      cell.workdir.mkdir(parents=True, exist_ok=True)
      files.write_json(cell.workdir / 'config.json', config)
      result = {'recipe': cell.method, 'seed': cell.seed, 'test': {'accuracy': 0.5}}
      result |= {'device': '1 x cpu', 'versions': {}, 'wall_seconds': 1}
      files.write_json(cell.workdir / 'result.json', {**result, 'best_on_test': None})
    return [0]

  monkeypatch.setattr(tables, 'sweep', sweep)
  return seen


def test_a_table_with_other_options_is_not_the_published_one(
  make_table, swept, tmp_path
):
  code, found = make_table('--config.model.trunk=tiny_cnn', '--seeds=1', '--methods=ce')
  assert code == 0 and not (tmp_path / 'results').exists()
  assert swept[0][1:] == ('ce', '1', ('--config.model.trunk=tiny_cnn',))
  assert (found['methods'], found['seeds']) == (['ce'], [1])
  assert [row['seeds'] for row in found['rows']] == [[1]]
  code, found = make_table('--vectorise')
  assert code == 0 and found['command'].endswith('--workdir=DIR -- --vectorise')
  assert found == json.loads((tmp_path / 'results/digits_lt.json').read_text())
  assert [row['seeds'] for row in found['rows']] == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
  ('option', 'found', 'same'),
  [
    ('--config.data.source=npz:/home/me/x.npz', '--config.data.source=npz:x.npz', True),
    ('--config.domains.usps.dir=/home/me/u', '--config.domains.usps.dir=u', True),
    ('--config.data.seed=1', '--config.data.seed=1', False),
  ],
)
def test_a_table_does_not_tell_where_the_data_were(option, found, same):
  from benchmarks import tables

  assert tables.anywhere(option) == found
  assert bool(tables.SAME_TABLE.fullmatch(option)) is same


def test_the_command_of_a_row_makes_its_runs(make_table, swept):
  options = ('--config.data.source=npz:some where.npz', '--tracker=wandb')
  _, found = make_table(*options)
  command = "python -m lt_jax.main --config=configs/digits_lt.py:ce,epochs=6 '{}' {}"
  assert found['rows'][0]['command'] == command.format(
    options[0], '--config.seed=SEED --workdir=DIR'
  )
  _, found = make_table()  # from the cells that exist so far
  assert 'source' not in found['rows'][0]['command']


def test_a_table_without_a_row_is_reported_in_one_line(make_table, swept, monkeypatch):
  from benchmarks import tables

  code, message = make_table('--seeds=0,x')
  assert code == 2 and not swept
  assert message == "error: --seeds: 'x' is not a whole number\n"

  def failing(chosen, workdir):
    failed = {'recipe': 'ce', 'seed': 0, 'error': 'Diverged: not finite', 'time': 1.5}
    (workdir / 'ce' / '0').mkdir(parents=True)
    files.write_json(workdir / 'ce' / '0' / 'error.json', failed)
    return [0, 3]

  monkeypatch.setattr(tables, 'sweep', failing)
  code, message = make_table()
  assert code == 3 and message.count('\n') == 1
  assert message.startswith('error: no run in ')


@pytest.mark.slow
def test_a_table_holds_what_its_runs_found(make_table, tmp_path):
  option = '--config.model.trunk=tiny_cnn'
  cores = os.sched_getaffinity(0)
  code, found = make_table(option)
  assert code == 0 and os.sched_getaffinity(0) == cores
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


@pytest.mark.parametrize('name', ['digits_lt_switches', 'cifar10_lt_cb_focal'])
def test_every_cell_of_a_grid_has_a_config(name):
  """Its keys exist, as do the keys that are set with it."""
  from benchmarks import tables

  table = tables.TABLES[name]
  given = [o[7:] for o in table.options if o.startswith('--grid=')]
  keys = [o[9:].split('=') for o in table.options if o.startswith('--config.')]
  made = {key: _value(text) for key, text in keys}
  file, _, options = table.config.partition(':')
  make = loader(f'{child.ROOT}/configs/{file}', options, made)
  every = cells([table.methods], ['0'], pathlib.Path(), parse_grid(given))
  digests = {
    config_digest(resolve(at_point(make(cell.method), cell.point))) for cell in every
  }
  assert len(digests) == len(every) == (16 if 'switches' in name else 12)


def finished(folder, config, accuracy, best):
  folder.mkdir(parents=True)
  files.write_json(folder / 'config.json', config)
  result = {'test': {'accuracy': accuracy}, 'best_on_test': {'accuracy': best}}
  files.write_json(folder / 'result.json', result)


def test_the_two_component_table_has_a_cell_a_recipe_and_imbalance(tmp_path):
  from benchmarks import two_component

  for seed, accuracy in enumerate((0.5, 0.7)):
    config = resolve(cifar10_lt.get_config('cb_ce,imbalance=100')) | {'seed': seed}
    finished(tmp_path / f'100/cb_ce/{seed}', config, accuracy, 0.75)
  short = resolve(cifar10_lt.get_config('l2rw,imbalance=100,epochs=2'))
  finished(tmp_path / '100/l2rw/0', short, 0.9, 0.9)
  table, notes = two_component.table(10, two_component.cells(10, tmp_path))
  assert len(table.rows) == 14 and len(table.headings) == 2 + 6
  cells = {row[1]: dict(zip(table.headings, row, strict=True)) for row in table.rows}
  expected = '40.0 ± 14.1 (best 25.0 ± 0.0, 2 of 3 seeds); 27.63*'
  assert cells['cb_ce']['imbalance 100'] == expected
  assert cells['l2rw']['imbalance 100'] == 'not run; 27.77*'  # from another setting
  assert cells['l2rw']['imbalance 10'] == 'not run; 17.88*'
  assert cells['ldam']['imbalance 50'] == 'not run; -'
  assert any(n.startswith('l2rw at 10: doubtful at its source') for n in notes)


def test_every_row_of_the_two_component_table_has_a_sweep():
  from benchmarks import two_component

  for imbalance in two_component.IMBALANCES:
    made = set()
    for one in two_component.sweeps(100, imbalance).values():
      file, _, options = one.config.partition(':')
      make = loader(f'{child.ROOT}/configs/{file}', options, {})
      made |= {(m, make(m).data.imbalance) for m in one.methods.split(',')}
    recipes = {row.partition(',')[0] for row in two_component.ROWS}
    assert made == {(recipe, imbalance) for recipe in recipes}
