"""Pretrained weights: compared with PyTorch's outputs, and files with false claims."""

import functools
import hashlib
import json
import os
import pathlib
import pickle
import struct
import sys
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lt_jax import convert
from lt_jax.errors import UserError
from lt_jax.models import Classifier, make_classifier
from lt_jax.models.heads import linear
from lt_jax.models.resnet import RESNETS, basic, bottleneck, resnet
from lt_jax.pretrained import published
from tests.golden import resnet_torch as golden

TRUNKS = {**RESNETS, 'caffe': functools.partial(resnet, bottleneck, (1, 2, 1, 1))}
TINY = Classifier(resnet(basic, (1, 1, 1, 1), width=4), linear(3))


def shapes_of(net):
  """Returns the shapes of a classifier's (params, stats); nothing is computed."""
  images = np.zeros((1, 64, 64, 3), np.float32)
  init = functools.partial(net.init, train=False)
  variables = jax.eval_shape(init, jax.random.key(0), images)
  return variables['params'], variables['batch_stats']


def zeros(shapes):
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def weights(tensors):
  return published.Weights(tensors, 'FILE', '', '', (), ())


@pytest.fixture(scope='module')
def stored():
  with np.load(golden.FILE, allow_pickle=False) as file:
    return dict(file)


def state_shapes(stored, name):
  """Returns (name, shape) of PyTorch's own state of a network."""
  return [(key, tuple(s)) for key, s in json.loads(bytes(stored[f'{name}/state']))]


def tiny_state(classes=3):
  """Returns weights with torchvision's names for `TINY`."""
  shapes = {'conv1.weight': (4, 3, 7, 7), 'bn1': 4}
  channels = 4
  for stage in range(1, 5):
    width, block = 4 * 2 ** (stage - 1), f'layer{stage}.0'
    shapes |= {f'{block}.conv1.weight': (width, channels, 3, 3), f'{block}.bn1': width}
    shapes |= {f'{block}.conv2.weight': (width, width, 3, 3), f'{block}.bn2': width}
    if stage > 1:
      shapes[f'{block}.downsample.0.weight'] = (width, channels, 1, 1)
      shapes[f'{block}.downsample.1'] = width
    channels = width
  state = {}
  for name, shape in shapes.items():
    if isinstance(shape, tuple):
      state[name] = golden.tensor(name, shape)
      continue
    for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
      state[f'{name}.{leaf}'] = golden.tensor(f'{name}.{leaf}', (shape,))
    state[f'{name}.num_batches_tracked'] = np.int64(7)
  state['fc.weight'] = golden.tensor('fc.weight', (classes, 32))
  state['fc.bias'] = golden.tensor('fc.bias', (classes,))
  return {name: np.asarray(value) for name, value in state.items()}


# Against PyTorch.


def outputs_of(name):
  """Returns what `golden.run` does, for our network with the same weights."""
  style = 'caffe' if name == 'caffe' else 'torch'
  net = Classifier(TRUNKS[name](style=style), linear(golden.CLASSES))
  stem = resnet(basic, (), style=style)

  def load(shapes):
    tensors = {key: golden.tensor(key, shape) for key, shape in shapes}
    params, stats, report = published.assign(
      weights(tensors), *map(zeros, shapes_of(net)), head=True
    )
    assert report.fresh == report.dropped == ()
    assert report.loaded == sum('num_batches' not in key for key in tensors)
    return {'params': params, 'batch_stats': stats}

  @jax.jit
  def run(variables, images):
    def is_block(module, method):
      return method == '__call__' and '_block' in (module.name or '')

    found, intermediates = net.apply(
      variables, images, train=False, capture_intermediates=is_block
    )
    blocks = intermediates['intermediates']['trunk']
    outputs = {'logits': found['logits']}
    for stage, length in enumerate(golden.NETWORKS[name][0], start=1):
      block = blocks[f'stage{stage}_block{length}']
      outputs[f'stage{stage}'] = block['__call__'][0]
    first = {
      kind: {
        key: tree['trunk'][key] for key in ('conv', 'norm') if key in tree['trunk']
      }
      for kind, tree in variables.items()
    }
    outputs['stem'] = stem.apply(first, images, train=False)
    return outputs

  return load, run


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow if name.startswith('resnext') else ())
    for name in golden.NETWORKS
  ],
)
def test_every_stage_agrees_with_pytorch(name, stored):
  load, run = outputs_of(name)
  for key, found in run(load(state_shapes(stored, name)), golden.images()).items():
    expected = stored[f'{name}/{key}']
    error = np.abs(golden.sample(np.asarray(found)) - expected).max()
    assert error <= 1e-5 * np.abs(expected).max(), key
    assert expected.std() > 0.2


def test_pytorch_reproduces_the_stored_outputs(stored):
  pytest.importorskip('torch')
  live = golden.run('resnet18')
  assert live.keys() == {key for key in stored if key.startswith('resnet18/')}
  for key, value in live.items():
    np.testing.assert_allclose(value, stored[key], rtol=1e-5, atol=1e-5)


# From a file into a network.


@pytest.mark.parametrize(
  ('classes', 'head', 'taken'), [(3, True, True), (3, False, False), (5, True, False)]
)
def test_a_head_is_taken_where_it_fits_and_is_wanted(classes, head, taken):
  """For shapes, as in a rehearsal, which are checked and stay shapes."""
  shapes = shapes_of(TINY)
  params, stats, report = published.assign(
    weights(tiny_state(classes)), *shapes, head=head
  )
  assert (params, stats) == shapes
  assert report.dropped == (() if taken else ('fc.bias', 'fc.weight'))
  assert report.fresh == (() if taken else ('head/bias', 'head/kernel'))


@pytest.mark.parametrize(
  ('prefix', 'dtype'),
  [
    ('', np.float32),
    ('module.', np.float64),
    ('module.backbone.', np.float16),
    ('encoder.', ml_dtypes.bfloat16),
  ],
)
def test_a_file_with_any_prefix_and_type(tmp_path, prefix, dtype):
  state = tiny_state()
  path = tmp_path / 'w.safetensors'
  path.write_bytes(
    made({prefix + k: v if v.ndim == 0 else v.astype(dtype) for k, v in state.items()})
  )
  params, stats, report = published.pretrained(
    str(path), *map(zeros, shapes_of(TINY)), head=True
  )
  block = params['trunk']['stage2_block1']
  for ours, theirs in (
    (params['trunk']['conv']['kernel'], state['conv1.weight'].transpose(2, 3, 1, 0)),
    (block['shortcut_norm']['scale'], state['layer2.0.downsample.1.weight']),
    (block['norm2']['bias'], state['layer2.0.bn2.bias']),
    (stats['trunk']['norm']['var'], state['bn1.running_var']),
    (params['head']['kernel'], state['fc.weight'].T),
  ):
    np.testing.assert_array_equal(ours, theirs.astype(dtype).astype(np.float32))
    assert ours.dtype == np.float32
  assert report._replace(loaded=0) == published.Report(
    source=str(path),
    revision='',
    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    loaded=0,
    fresh=(),
    dropped=(),
    mean=(),
    std=(),
  )
  assert report.loaded == len(jax.tree.leaves((params, stats)))
  json.dumps(report._asdict())


def test_parts_besides_the_trunk_stay(tmp_path):
  """A different head has a kernel of the same shape with another meaning."""
  options = {'head': 'cosine', 'num_classes': 3, 'attention': True, 'projection': 5}
  net = make_classifier('resnet10', trunk_options={'width': 4}, **options)
  params, stats = zeros(shapes_of(net))
  save_file(tiny_state(), tmp_path / 'w.safetensors')
  moved, _, report = published.pretrained(
    str(tmp_path / 'w.safetensors'), params, stats, head=True
  )
  assert report.dropped == ('fc.bias', 'fc.weight')
  assert {path.split('/')[0] for path in report.fresh} == {
    'attention',
    'head',
    'projection',
  }
  assert not np.any(moved['head']['kernel'])
  assert np.any(moved['trunk']['conv']['kernel'])


def test_another_network_is_named_and_counted(stored):
  tensors = {
    key: np.broadcast_to(np.float32(0), shape)
    for key, shape in state_shapes(stored, 'resnet18')
  }
  shapes = shapes_of(make_classifier('resnet50', 'linear', 10))
  with pytest.raises(UserError) as error:
    published.assign(weights(tensors), *shapes)
  line = str(error.value)
  # ResNet-50 has 53 convolutions and as many norms of 4 arrays, ResNet-18 20 of each.
  missing = 5 * (53 - 20)
  assert line.startswith(
    "FILE is of another network: 'layer1.0.conv3.weight' is missing"
  )
  assert f'({missing} missing, ' in line and '\n' not in line
  shapes = shapes_of(make_classifier('resnet32', 'linear', 10))
  with pytest.raises(UserError, match="'layer1.2.conv1.weight' is missing"):
    published.assign(weights(tensors), *shapes)
  shapes = shapes_of(make_classifier('digits_cnn', 'linear', 10))
  with pytest.raises(UserError, match='no published weights are known'):
    published.assign(weights(tensors), *shapes)


def change(name, value):
  return lambda state: state.update({name: value})


@pytest.mark.parametrize(
  ('edit', 'message'),
  [
    (lambda state: state.pop('bn1.bias'), "'bn1.bias' is missing .1 missing"),
    (
      change('layer1.0.se.fc1.weight', np.ones(4, np.float32)),
      "'layer1.0.se.fc1.weight' is not of this network .1 not of this network",
    ),
    (
      change('conv1.weight', np.ones((4, 3, 3, 3), np.float32)),
      "'conv1.weight' is of another shape .1 of another shape",
    ),
    (change('bn1.weight', np.array([1, 1, 1, np.nan])), 'bn1.weight has values'),
    (change('bn1.weight', np.array([1, 1, 1, 1e300])), 'bn1.weight has values'),
    (change('bn1.weight', np.ones(4, np.int64)), 'bn1.weight has values'),
    (change('bn1.running_var', np.array([1, 1, 1, -1e-3])), 'running_var has values'),
    (change('module.bn1.bias', np.ones(4)), "'bn1.bias' twice, under two prefixes"),
    (change('\n\x1b[2J' * 999, np.ones(4)), r"'\\n\\x1b\[2J\\n"),
  ],
)
def test_weights_that_do_not_fit_are_rejected(edit, message):
  state = tiny_state()
  edit(state)
  with pytest.raises(UserError, match=message) as error:
    published.assign(weights(state), *shapes_of(TINY))
  assert len(str(error.value)) < 300 and str(error.value).isprintable()


# Files with false claims.


def raw(header, data=b''):
  """Returns the bytes of a file with an arbitrary header and data."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack('<Q', len(text)) + text + data


def made(tensors):
  """Returns the bytes of a good file, written by the format's definition."""
  codes = {
    'float64': 'F64',
    'float32': 'F32',
    'float16': 'F16',
    'bfloat16': 'BF16',
    'int64': 'I64',
  }
  header, data = {}, b''
  for name, value in tensors.items():
    end = len(data) + value.nbytes
    header[name] = {
      'dtype': codes[str(value.dtype)],
      'shape': value.shape,
      'data_offsets': [len(data), end],
    }
    data += value.tobytes()
  return raw(header, data)


def claim(dtype, shape, *offsets):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}


GOOD = made({'a': np.arange(6, dtype=np.float32).reshape(2, 3)})


def test_a_good_file_is_read(tmp_path):
  path = tmp_path / 'w.safetensors'
  path.write_bytes(GOOD)
  found = published.load(str(path))
  np.testing.assert_array_equal(found.tensors['a'], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'', 'truncated'),
    (GOOD[:5], 'truncated'),
    (GOOD[:20], 'truncated'),
    (GOOD[:-1], 'not fully covered'),
    (GOOD + b'x', 'not fully covered'),
    (struct.pack('<Q', 2**40) + b'{}', 'truncated'),
    (struct.pack('<Q', 2**64 - 1) + b'{}', 'truncated'),
    (raw(b' ' * 2**20 + b'{}'), 'claims an impossible header of 1048578 bytes'),
    (raw({'a': claim('F32', [2**44], 0, 2**46)}), 'not fully covered'),
    (raw({'a': claim('F32', [2**62, 4], 0, 0)}), 'overflow'),
    (raw({'a': claim('F32', [2**44], 0, 4)}, b'....'), 'not a complete safetensors'),
    (raw({'a': claim('F32', [-1], 0, 4)}, b'....'), 'not a complete safetensors'),
    (raw({'a': claim('Q7\n', [1], 0, 4)}, b'....'), 'unknown variant'),
    (raw({'a': claim('F8_E4M3', [4], 0, 4)}, b'....'), 'elements F8_E4M3; known'),
    (raw({'a': claim('BOOL', [4], 0, 4)}, b'....'), 'elements BOOL; known'),
    (
      raw({'a': claim('F32', [1], 0, 4), 'b': claim('F32', [1], 2, 6)}, b'......'),
      'invalid offset',
    ),
    (raw({'a': claim('F32', [1], 4, 8)}, b'........'), 'invalid offset'),
    (raw({'a': claim('F32', [1], 4, 0)}, b'....'), 'not a complete safetensors'),
    (raw(b'{' * 2**19), 'not a complete safetensors'),
    (raw(b'[' * 2**19), 'not a complete safetensors'),
    (raw(b'\xff\xfe'), 'not a complete safetensors'),
    (raw(b'{"a": 1}'), 'not a complete safetensors'),
    (pickle.dumps({'a': 1}), 'truncated'),
  ],
)
def test_a_file_with_false_claims_is_rejected(tmp_path, data, message):
  path = tmp_path / 'w.safetensors'
  path.write_bytes(data)
  with pytest.raises(UserError, match=message) as error:
    published.load(str(path))
  line = str(error.value)
  assert line.startswith(str(path)) and line.isprintable()
  assert len(line) < len(str(path)) + 250


def test_a_file_is_rejected_by_its_size_before_it_is_read(tmp_path):
  path = tmp_path / 'w.safetensors'
  path.write_bytes(GOOD)
  os.truncate(path, 2**42)  # takes no disk space
  with pytest.raises(UserError, match='4398046511104 bytes, more than any weights'):
    published.load(str(path))


def test_what_is_not_a_file_is_rejected(tmp_path):
  os.mkfifo(tmp_path / 'pipe.safetensors')
  (tmp_path / 'folder.safetensors').mkdir()
  for name in ('pipe', 'folder', 'absent'):
    with pytest.raises(UserError, match='there is no file'):
      published.load(str(tmp_path / f'{name}.safetensors'))


class Hostile:
  """Leaves a mark if it is unpickled."""

  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return pathlib.Path.touch, (self.mark,)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('w.pth', 'python -m lt_jax.convert --source=.*w.pth --out='),
    ('w.pt', 'lt_jax.convert'),
    ('pytorch_model.bin', 'lt_jax.convert'),
    ('w.pth.tar', 'lt_jax.convert'),
    ('w.npy', 'is neither a .safetensors file'),
    ('w.safetensors', 'truncated'),
  ],
)
def test_nothing_is_unpickled(tmp_path, name, message):
  path, mark = tmp_path / name, tmp_path / 'mark'
  with path.open('wb') as file:
    if name == 'w.npy':
      np.save(file, np.array([Hostile(mark)], object), allow_pickle=True)
    else:
      pickle.dump(Hostile(mark), file)
  with pytest.raises(UserError, match=message):
    published.load(str(path))
  assert not mark.exists()


@pytest.mark.parametrize('name', ['resnet50', '', 'a/b/c', '/timm/resnet50', 'a b/c'])
def test_a_name_that_means_nothing(name):
  with pytest.raises(UserError, match='neither a .safetensors file, nor OWNER/MODEL'):
    published.load(name)


# Downloads, with no network.


class HfHubHTTPError(OSError):
  pass


class RepositoryNotFoundError(HfHubHTTPError):
  pass


class GatedRepoError(RepositoryNotFoundError):
  pass


class EntryNotFoundError(Exception):
  pass


class LocalEntryNotFoundError(FileNotFoundError, EntryNotFoundError):
  pass


@pytest.fixture
def hub(monkeypatch):
  """Replaces the function of huggingface_hub by answers from `hub.answers`."""
  fake = types.ModuleType('huggingface_hub')
  fake.asked, fake.answers = [], []

  def hf_hub_download(repo_id, filename, **options):
    fake.asked.append((repo_id, filename, options))
    answer = fake.answers.pop(0)
    if isinstance(answer, Exception):
      raise answer
    return answer

  fake.hf_hub_download = hf_hub_download
  monkeypatch.setitem(sys.modules, 'huggingface_hub', fake)
  return fake


def test_a_model_is_downloaded_once(tmp_path, hub):
  path = tmp_path / 'snapshots' / '5f1c0ffee' / 'model.safetensors'
  path.parent.mkdir(parents=True)
  save_file(tiny_state(), path)
  hub.answers = [LocalEntryNotFoundError(), str(path), str(path)]
  for revision, expected in ((None, 2), ('main', 3)):
    name = 'timm/resnet18.tv_in1k' + (f'@{revision}' if revision else '')
    found = published.load(name)
    assert (found.source, found.revision) == (name, '5f1c0ffee')
    assert found.mean == (0.485, 0.456, 0.406) and found.std == (0.229, 0.224, 0.225)
    assert len(hub.asked) == expected
    repository, file, options = hub.asked[-1]
    assert (repository, file) == ('timm/resnet18.tv_in1k', 'model.safetensors')
    assert options['revision'] == revision
  assert [o.get('local_files_only', False) for *_, o in hub.asked] == [
    True,
    False,
    True,
  ]
  hub.answers = [str(path)]
  assert published.load('timm/resnet18.a1_in1k').mean == ()


@pytest.mark.parametrize(
  ('error', 'message'),
  [
    (LocalEntryNotFoundError('retry'), 'there is no network to download it; or fetch'),
    (
      GatedRepoError('401'),
      'the hub has no such model, or you have no access to it; or fetch',
    ),
    (EntryNotFoundError('404'), 'it has no model.safetensors; or fetch'),
  ],
)
def test_a_download_that_cannot_be(hub, error, message):
  hub.answers = [LocalEntryNotFoundError(), error]
  with pytest.raises(UserError, match=f'^timm/resnet50.tv_in1k: {message}') as raised:
    published.load('timm/resnet50.tv_in1k')
  address = (
    'https://huggingface.co/timm/resnet50.tv_in1k/resolve/main/model.safetensors'
  )
  assert address in str(raised.value) and str(raised.value).isprintable()


def test_a_download_that_may_succeed_later(hub):
  hub.answers = [LocalEntryNotFoundError(), HfHubHTTPError('503\nbusy')]
  with pytest.raises(OSError, match=r"not downloaded: 'HfHubHTTPError: 503\\nbusy'"):
    published.load('someone/model')


def test_a_network_we_do_not_have_is_not_downloaded(hub):
  """Some of timm's have our names and shapes but pool differently."""
  with pytest.raises(UserError, match="network of timm 'resnetaa50'; did you mean"):
    published.load('timm/resnetaa50.a1h_in1k')
  assert hub.asked == []


def test_without_the_package(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(
    UserError, match='downloading needs pip install .*; or fetch https'
  ):
    published.load('timm/resnet50.tv_in1k')


def test_the_real_package_without_a_network(tmp_path, monkeypatch):
  constants = pytest.importorskip('huggingface_hub.constants')
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  with pytest.raises(UserError, match='there is no network to download it'):
    published.load('timm/resnet50.tv_in1k')
  with pytest.raises(UserError, match='that is not a model name'):
    published.load('timm--/resnet50--a')


# The converter.


@pytest.mark.parametrize(
  ('source', 'out', 'message'),
  [
    ('w.pth', 'w.pth', 'must end in .safetensors'),
    ('w.pth', 'absent/w.safetensors', 'in a folder that does not exist'),
    ('absent.pth', 'w.safetensors', 'there is no file absent.pth'),
    ('w-0123abcd.pth', 'w.safetensors', 'is damaged: its digest'),
    ('w.pth', 'w.safetensors', 'converting needs PyTorch: pip install torch'),
  ],
)
def test_what_the_converter_rejects(tmp_path, monkeypatch, source, out, message):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, 'torch', None)
  for name in ('w.pth', 'w-0123abcd.pth'):
    (tmp_path / name).write_bytes(b'weights')
  with pytest.raises(UserError, match=message):
    convert.convert(source, out)
  assert not (tmp_path / 'w.safetensors').exists()


def torch_file(path, value):
  torch = pytest.importorskip('torch')
  torch.save(value, path)
  return torch


@pytest.mark.parametrize('wrapper', [None, 'state_dict', 'model', 'state_dict_best'])
def test_a_file_of_pytorch_is_converted(tmp_path, wrapper):
  torch = pytest.importorskip('torch')
  state = {f'module.{k}': torch.from_numpy(v) for k, v in tiny_state().items()}
  state['module.bn1.bias'] = state['module.bn1.bias'].bfloat16()
  state['module.bn1.weight'] = torch.ones(1).expand(4)
  whole = {'epoch': 3, 'optimizer': {'lr': 0.1}, wrapper: state} if wrapper else state
  torch.save(whole, tmp_path / 'w.pth')
  digest = hashlib.sha256((tmp_path / 'w.pth').read_bytes()).hexdigest()
  source = (tmp_path / 'w.pth').rename(tmp_path / f'w-{digest[:8]}.pth')
  out = tmp_path / 'w.safetensors'
  assert convert.convert(str(source), str(out)) == len(state)
  params, _, report = published.pretrained(
    str(out), *map(zeros, shapes_of(TINY)), head=True
  )
  assert report.fresh == () and np.all(params['trunk']['norm']['scale'] == 1)
  assert [path.name for path in tmp_path.iterdir()].count('w.safetensors') == 1
  assert len(list(tmp_path.iterdir())) == 2


def test_the_converter_runs_no_code(tmp_path):
  path, mark = tmp_path / 'w.pth', tmp_path / 'mark'
  torch = torch_file(path, {'state_dict': {'a': Hostile(mark)}})
  cyclic = {'epoch': 1}
  cyclic['model'] = cyclic
  torch.save(cyclic, tmp_path / 'cyclic.pth')
  torch.save({'a': torch.zeros(1).expand(2**40)}, tmp_path / 'bomb.pth')
  torch.save({'a': torch.eye(3).to_sparse()}, tmp_path / 'sparse.pth')
  torch.save([torch.zeros(3)], tmp_path / 'list.pth')
  (tmp_path / 'short.pth').write_bytes((tmp_path / 'bomb.pth').read_bytes()[:99])
  for name, message in {
    'w': 'damaged, or holds more than tensors: UnpicklingError',
    'short': 'damaged, or holds more than tensors',
    'cyclic': "'epoch' is not a tensor",
    'bomb': 'bytes of tensors, too many for weights',
    'sparse': 'unusual tensors',
    'list': 'not hold a dict of tensors',
  }.items():
    with pytest.raises(UserError, match=message):
      convert.convert(str(tmp_path / f'{name}.pth'), str(tmp_path / 'out.safetensors'))
  assert not mark.exists() and not (tmp_path / 'out.safetensors').exists()


def test_the_converted_file_says_where_it_is_from(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save({'a': torch.arange(3.0)}, tmp_path / 'w.pth')
  out = tmp_path / 'w.safetensors'
  convert.convert(str(tmp_path / 'w.pth'), str(out))
  header = json.loads(out.read_bytes()[8:].partition(b'}}')[0] + b'}}')
  assert header['__metadata__']['source'] == 'w.pth'
  np.testing.assert_array_equal(load_file(out)['a'], [0, 1, 2])
