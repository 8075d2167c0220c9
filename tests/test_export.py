"""Networks exported from their runs are unchanged when read back."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from lt_jax import checkpoint, export, files, trained
from lt_jax.errors import UserError
from tests import tiny
from tests.test_predict import fitted, leave


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """The folder of a run whose method has a memory besides parameters."""
  folder = tmp_path_factory.mktemp('run')
  config = tiny.config(tiny.write_npz(folder / 'tiny.npz', (8, 1, 1, 1)), 'openmax')
  leave(config, folder / 'run', fitted)
  return epath.Path(folder / 'run')


@pytest.fixture(scope='module')
def network(workdir):
  return trained.open_run(workdir)


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(1).integers(0, 256, (5, 8, 8, 1), np.uint8)


@pytest.fixture(scope='module')
def expected(network, images):
  return jax.device_get(jax.jit(network.predict)(network.state, images))


@pytest.fixture(scope='module')
def arrays(workdir, tmp_path_factory):
  """Returns (exported file, contents of its header)."""
  path = tmp_path_factory.mktemp('arrays') / 'one.safetensors'
  return path, export.export(workdir, 'safetensors', path)


def held(state):
  return {name: getattr(state, name) for name in export.FIELDS}


def test_arrays_make_the_network_again(arrays, network, images, expected):
  path, header = arrays
  loaded = export.load(path)
  assert checkpoint.digest(held(loaded.state)) == checkpoint.digest(held(network.state))
  assert jax.tree.structure(held(loaded.state)) == jax.tree.structure(
    held(network.state)
  )
  again = jax.device_get(jax.jit(loaded.predict)(loaded.state, images))
  assert again.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(again[name], value)
  assert loaded.class_names == network.class_names and loaded.step == network.step
  assert loaded.config == network.config and loaded.predicts_by == network.predicts_by
  assert header['state_sha256'] == checkpoint.digest(network.state)
  assert [p.name for p in path.parent.iterdir()] == ['one.safetensors']


def test_a_threshold_goes_along_with_the_state_that_it_was_chosen_for(
  workdir, network, tmp_path, capsys
):
  workdir = epath.Path(shutil.copytree(workdir, tmp_path / 'run'))
  threshold = {'value': 0.5, 'chosen_by': 'keeps 95 % of val'}
  data = files.read_json(workdir / 'data.json')
  files.write_json(workdir / 'data.json', data | {'threshold': threshold})
  files.write_json(workdir / 'result.json', {'step': 1, 'threshold': threshold})
  for which, expected in (('last', threshold), ('best', None)):
    path = tmp_path / f'{which}.safetensors'
    assert export.export(workdir, 'safetensors', path, which=which)['threshold'] == (
      expected
    )
    assert export.load(path).threshold == (expected and expected['value'])
    printed = capsys.readouterr().out
    assert 'images: ' not in printed  # there is only one domain
  assert network.predicts_by.startswith("normalised as 'source'; batch statistics: ")


def test_other_tools_can_read_the_arrays(arrays, network):
  """With the public library: flat paths, and all necessary facts in the header."""
  from safetensors import safe_open

  with safe_open(arrays[0], framework='numpy') as file:
    header = file.metadata()
    kernel = file.get_tensor('params.net.head.kernel')
    assert file.get_tensor('memory.openmax.fitted').dtype == bool
    assert not any(name.startswith(('opt', 'key')) for name in file.keys())  # noqa: SIM118
  np.testing.assert_array_equal(kernel, network.state.params['net']['head']['kernel'])
  assert json.loads(header['class_names']) == ['0', '1', '2', '3']
  assert json.loads(header['preprocessing'])['mean'] == [0.5]
  assert {'config', 'config_digest', 'recipe', 'sha256', 'step'} <= header.keys()


def test_damaged_or_foreign_files_are_rejected(arrays, tmp_path):
  data = bytearray(arrays[0].read_bytes())
  path = tmp_path / 'bad.safetensors'
  for change, message in (
    (lambda b: b[:-4] + bytes([b[-4] ^ 1]) + b[-3:], 'do not have the recorded digest'),
    (lambda b: b[:-100], 'is damaged, or no .safetensors file'),
    (lambda b: b'', 'is damaged, or no .safetensors file'),
  ):
    path.write_bytes(change(bytes(data)))
    with pytest.raises(UserError, match=message):
      export.load(path)
  header, tensors = export._read(arrays[0])
  config = json.loads(header['config'])
  for change, message in (
    ({'class_names': '5'}, "has an unexpected value for 'class_names'"),
    ({'step': '"1"'}, "has an unexpected value for 'step'"),
    ({'config': '5'}, "has an unexpected value for 'config'"),
    ({'config': json.dumps(config | {'domains': 5})}, 'unexpected value for .domains'),
  ):
    save_file(tensors, path, header | change)
    with pytest.raises(UserError, match=message):
      export.load(path)
  save_file({'x': np.zeros(3)}, path)
  with pytest.raises(UserError, match="was not exported here: 'config'"):
    export.load(path)
  with pytest.raises(UserError, match='cannot be read: No such file'):
    export.load(tmp_path / 'absent.safetensors')


@pytest.mark.slow
@pytest.mark.parametrize('part', ['header', 'config'])
def test_any_damage_to_an_exported_file_is_reported(arrays, tmp_path, part):
  """Any key lost or of another type is rejected in one line or makes no difference."""
  header, tensors = export._read(arrays[0])
  path = tmp_path / 'bad.safetensors'
  content = header if part == 'header' else json.loads(header['config'])
  for key in content:
    rest = {k: v for k, v in content.items() if k != key}
    for change in ({}, {key: '5'}, {key: '[]'}, {key: '{"name": 1e999}'}):
      changed = rest | change
      if part == 'config':
        changed = {k: json.loads(v) for k, v in change.items()}
        changed = header | {'config': json.dumps(rest | changed)}
      save_file(tensors, path, changed)
      print(key, change)
      try:
        export.load(path)
      except UserError as error:
        assert '\n' not in str(error)


def test_arrays_of_another_network_are_rejected():
  tree = {'params': {'kernel': np.zeros((2, 3)), 'bias': np.zeros(3)}}
  whole = {'params.kernel': np.ones((2, 3)), 'params.bias': np.ones(3)}
  back = export.put_back(whole, tree, 'f')
  assert back['params']['kernel'].sum() == 6
  for change, message in (
    ({'params.kernel': np.ones((2, 4))}, r'params.kernel is float64 of shape \(2, 4\)'),
    ({'params.bias': np.ones(3, np.float32)}, 'float64 of shape .* in the network'),
    ({'params.more': np.ones(1)}, 'params.more .* absent in the network'),
  ):
    with pytest.raises(UserError, match=message):
      export.put_back(whole | change, tree, 'f')
  with pytest.raises(UserError, match='params.bias is absent there'):
    export.put_back({'params.kernel': whole['params.kernel']}, tree, 'f')


def test_a_program_predicts_batches_of_any_size(
  workdir, network, images, expected, tmp_path
):
  path = tmp_path / 'one.stablehlo'
  export.export(workdir, 'stablehlo', path)
  program = jax.export.deserialize(bytearray(path.read_bytes()))
  assert program.platforms == export.PLATFORMS and program.nr_devices == 1
  for size in (1, 5):
    found = jax.device_get(program.call(images[:size]))
    for name, value in expected.items():
      np.testing.assert_allclose(found[name], value[:size], rtol=1e-4, atol=1e-5)
  description = json.loads((tmp_path / 'one.stablehlo.json').read_text())
  assert description['class_names'] == list(network.class_names)
  assert description['input'] == {'shape': ['batch', 8, 8, 1], 'dtype': 'uint8'}
  assert {name: out['shape'][1:] for name, out in description['outputs'].items()} == {
    name: list(value.shape[1:]) for name, value in expected.items()
  }
  assert {p.name for p in tmp_path.iterdir()} == {
    'one.stablehlo',
    'one.stablehlo.json',
  }


@pytest.mark.parametrize('wrong', [1.01, np.nan])
def test_an_export_that_predicts_differently_is_not_written(
  workdir, tmp_path, monkeypatch, wrong
):
  load = export.load

  def changed(path):
    loaded = load(path)
    scaled = jax.tree.map(lambda x: wrong * x, loaded.state.params)
    return loaded._replace(state=loaded.state.replace(params=scaled))

  monkeypatch.setattr(export, 'load', changed)
  out = tmp_path / 'one.safetensors'
  out.write_text('as it was')
  with pytest.raises(UserError, match='is not written: read back, its pred'):
    export.export(workdir, 'safetensors', out)
  assert out.read_text() == 'as it was' and len(list(tmp_path.iterdir())) == 1


def test_mistakes_are_reported_first(workdir, tmp_path):
  for to, out, message in (
    ('onnx', 'x.onnx', "unknown format 'onnx'"),
    ('safetensor', 'x.safetensors', "did you mean 'safetensors'"),
    ('stablehlo', 'x.safetensors', 'must end in .stablehlo'),
    ('stablehlo', 'no/x.stablehlo', 'in a folder that does not exist'),
  ):
    with pytest.raises(UserError, match=message):
      export.export(workdir, to, tmp_path / out)
  with pytest.raises(UserError, match='is not a run'):
    export.export(epath.Path(tmp_path), 'safetensors', tmp_path / 'x.safetensors')
  assert not list(pathlib.Path(tmp_path).iterdir())
  for to, there in (
    ('safetensors', 'x.safetensors'),
    ('stablehlo', 'y.stablehlo.json'),
  ):
    (tmp_path / there).mkdir()
    with pytest.raises(
      UserError, match=f'{there}, which exists but is not a regular file'
    ):
      export.export(epath.Path('absent'), to, tmp_path / f'{there[0]}.{to}')
