"""Published weights, such as torchvision's and timm's: reading, checking, assigning.

The source is a `.safetensors` file, local or in an object store, or a model on the
Hugging Face hub, such as 'timm/resnet50.tv_in1k'. Such files hold only numbers and
cannot run code. Weights that do not match the network in every parameter are rejected.
PyTorch files can run code: only `lt_jax.convert` reads them, once.

Names and shapes do not reveal everything. The user must know:

- The style of a residual network (`lt_jax.models.resnet.STYLES`), and changes of
pooling or activations in some variants of these networks. AlexNet needs the style
'torchvision'. - The pixels. torchvision's weights expect RGB in [0, 1] minus (0.485,
0.456, 0.406), divided by (0.229, 0.224, 0.225). So do nearly all of timm's; see each
model's card. Weights published for Caffe expect BGR in [0, 255] minus (103.939,
116.779, 123.68), those of EfficientNet-Lite RGB in [0, 255] minus 127, divided by 128.
If the names determine this, the report says so. - torchvision's second weights (timm's
tag tv2_in1k) were trained at 176 pixels with a different recipe; the first (tv_in1k) at
224.
"""

import functools
import hashlib
import os
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from lt_jax.errors import UserError, lookup
from lt_jax.files import is_remote
from lt_jax.models.resnet import RESNETS
from lt_jax.pretrained.dialects import DIALECTS, TIMM, TORCHVISION, Dialect

PyTree = Any

MOST_HEADER = 2**20
"""Largest header to parse, in bytes; ResNet-152's is a tenth of it."""

MOST_BYTES = 2**31
"""Largest file to read, in bytes; ResNet-152 in float64 is a quarter of it."""

DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'I64': np.int64,  # for PyTorch's count of batches, which is dropped
}
"""Element type in a file -> NumPy type. The numbers are then converted to float32."""

CODE = ('.pth', '.pt', '.bin', '.tar', '.pkl', '.ckpt')
"""Extensions of files that PyTorch writes and that can run code."""

PREFIXES = re.compile(r'^(module\.|backbone\.|encoder\.)+')
"""Prefixes that training code adds to torchvision's names."""

MODEL = re.compile(r'[\w.-]+/[\w.-]+(@[\w.-]+)?')
"""The name of a model on the hub, with an optional revision after an @."""

REASONS = {
  'HFValidationError': 'that is not a model name',
  'RepositoryNotFoundError': 'the hub has no such model, or you have no access to it',
  'RevisionNotFoundError': 'the hub has no such revision of it',
  'LocalEntryNotFoundError': 'there is no network to download it',
  'EntryNotFoundError': 'it has no model.safetensors',
}
"""Errors of the hub that a retry will not fix, most specific first."""

HEAD = ('kernel', 'bias')
"""Parameters of a linear head."""

BOTH = ('weight', 'bias')
"""Parameters of a layer in PyTorch."""

LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
"""Our names of parameters -> PyTorch's."""


class Weights(NamedTuple):
  """The contents of a file.

  Attributes:
    tensors: name in the file -> array.
    source: the file or model.
    revision: revision of the hub's repository; empty for a file.
    sha256: digest of the file.
    mean: mean with which RGB in [0, 1] is normalised; empty if unknown.
    std: likewise, the standard deviation.
  """

  tensors: dict[str, np.ndarray]
  source: str
  revision: str
  sha256: str
  mean: tuple[float, ...]
  std: tuple[float, ...]


class Report(NamedTuple):
  """What was done with a file, as plain data for result.json.

  Attributes:
    source: the file or model.
    revision: revision of the hub's repository; empty for a file.
    sha256: digest of the file.
    loaded: number of arrays taken, parameters and statistics.
    fresh: paths in our network that kept their values, such as 'head/kernel'.
    dropped: names in the file that were not used, such as 'fc.weight'.
    mean: see `Weights`.
    std: see `Weights`.
  """

  source: str
  revision: str
  sha256: str
  loaded: int
  fresh: tuple[str, ...]
  dropped: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]


def pretrained(
  source: str,
  params: PyTree,
  stats: PyTree,
  *,
  head: bool = False,
) -> tuple[PyTree, PyTree, Report]:
  """Puts a file's weights into the trunk of a classifier.

  Args:
    source: a file or a model, see `load`.
    params: parameters of a classifier, or their shapes, which are then only checked.
    stats: its batch statistics, likewise.
    head: also take a linear head, if it has the same number of classes.

  Returns:
    (params, stats, what was done). Leaves that were taken are NumPy arrays.

  Raises:
    UserError: the file cannot be read, or holds the weights of another network.
  """
  return assign(load(source), params, stats, head=head)


def assign(
  weights: Weights, params: PyTree, stats: PyTree, *, head: bool = False
) -> tuple[PyTree, PyTree, Report]:
  """Does what `pretrained` does, with weights that are already loaded.

  Kernels are transposed from (out, in, H, W) to (H, W, in, out). Running averages are
  copied unchanged, although PyTorch averages the unbiased variance.
  """
  found = _by_name(weights)
  ours = {_path(keys): leaf for tree in (params, stats) for keys, leaf in _flat(tree)}
  dialect, names = _names(weights.source, ours, found)
  heads = {f'head/{leaf}': f'{dialect.head}.{LEAVES[leaf]}' for leaf in HEAD}
  expected = {path: _torch_shape(leaf.shape) for path, leaf in ours.items()}
  if head and _fits(found, expected, heads):
    names |= heads
  unused = {f'{layer}.{leaf}' for layer in dialect.hidden.values() for leaf in BOTH}
  dropped = (set(heads.values()) | unused) & found.keys() - set(names.values())
  _check(
    weights.source,
    {name: _shape_there(dialect, path, expected[path]) for path, name in names.items()},
    {name: value for name, value in found.items() if name not in dropped},
  )

  def leaf(keys: tuple, ours: Any) -> Any:
    path = _path(keys)
    if path not in names or isinstance(ours, jax.ShapeDtypeStruct):
      return ours
    value = found[names[path]].astype(ours.dtype).reshape(expected[path])
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T

  pixels = {'mean': weights.mean, 'std': weights.std}
  report = Report(
    source=weights.source,
    revision=weights.revision,
    sha256=weights.sha256,
    loaded=len(names),
    fresh=tuple(sorted(ours.keys() - names.keys())),
    dropped=tuple(sorted(dropped)),
    **(pixels if weights.mean else pixels | dialect.pixels),
  )
  moved = (jax.tree_util.tree_map_with_path(leaf, tree) for tree in (params, stats))
  return *moved, report


def load(source: str) -> Weights:
  """Reads weights from a file, or downloads them from the Hugging Face hub.

  It needs at most three times the file's size in memory, whatever the file claims.

  Args:
    source: a `.safetensors` file, or 'OWNER/MODEL' such as 'timm/resnet50.tv_in1k',
      optionally with a revision, 'OWNER/MODEL@REVISION'. A model that was downloaded
      before is not requested again.

  Raises:
    UserError: the file holds no weights or cannot be read, or the download fails.
  """
  revision, file, pixels = '', source, {'mean': (), 'std': ()}
  if source.endswith(CODE):
    raise UserError(
      f'{source} can run code when it is read: convert it once, python -m '
      f'lt_jax.convert --source={source} --out=WEIGHTS.safetensors'
    )
  if not source.endswith('.safetensors'):
    if not MODEL.fullmatch(source) or epath.Path(source).exists():
      raise UserError(f'{source!r} is neither a .safetensors file nor OWNER/MODEL')
    file, revision = _download(source)
    pixels |= _pixels(source)
  data = _read(file)
  sha256 = hashlib.sha256(data).hexdigest()
  return Weights(_parse(data, file), source, revision, sha256, **pixels)


def _pixels(model: str) -> Mapping[str, tuple[float, ...]]:
  """Returns the normalisation that a model on the hub expects, if its name says so."""
  owner, _, name = model.partition('@')[0].partition('/')
  network, _, tag = name.partition('.')
  if owner != 'timm':
    return {}
  return TORCHVISION if tag in ('tv_in1k', 'tv2_in1k') else TIMM.get(network, {})


def _read(path: epath.PathLike) -> bytes:
  """Returns a whole file if its size and header length are plausible."""
  path = epath.Path(path).expanduser()
  try:
    regular = path.is_file() if is_remote(path) else os.path.isfile(path)
    if not regular:  # a folder, or a pipe that never ends
      raise UserError(f'there is no file {path}')
    size = path.stat().length
    if size > MOST_BYTES:
      raise UserError(
        f'{path} has {size} bytes, more than any weights that are read here'
      )
    with path.open('rb') as file:
      start = file.read(8)
      header = int.from_bytes(start, 'little')
      if len(start) < 8 or header > size - 8:
        raise UserError(f'{path} is truncated, or not a safetensors file')
      if header > MOST_HEADER:
        raise UserError(f'{path} claims an impossible header of {header} bytes')
      file.seek(0)
      return file.read(size)
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}') from None


def _parse(data: bytes, path: epath.PathLike) -> dict[str, np.ndarray]:
  """Returns the arrays in a file's bytes, by name."""
  try:
    entries = safetensors.deserialize(data)
  except safetensors.SafetensorError as error:
    reason = str(error).partition(': ')[2] or str(error)
    raise UserError(
      f'{path} is not a complete safetensors file: {_quoted(reason)}'
    ) from None
  arrays = {}
  for name, entry in entries:
    if entry['dtype'] not in DTYPES:
      known = ', '.join(DTYPES)
      raise UserError(
        f'{path}: {_quoted(name)} has elements {entry["dtype"]}; known: {known}'
      )
    array = np.frombuffer(entry['data'], DTYPES[entry['dtype']])
    arrays[name] = array.reshape(entry['shape'])
  return arrays


def _download(model: str) -> tuple[str, str]:
  """Returns the file of a model on the hub, and its revision."""
  repository, _, revision = model.partition('@')
  owner, _, name = repository.partition('/')
  if owner == 'timm':  # other networks of timm can have the same names and shapes
    lookup({**RESNETS, **TIMM}, 'network of timm', name.partition('.')[0])
  by_hand = (
    f'or fetch https://huggingface.co/{repository}/resolve/{revision or "main"}'
    '/model.safetensors on any machine and name that file'
  )
  try:
    from huggingface_hub import hf_hub_download
  except ImportError:
    raise UserError(
      f"{model}: downloading needs pip install 'lt_jax[hub]'; {by_hand}"
    ) from None
  download = functools.partial(
    hf_hub_download,
    repository,
    'model.safetensors',
    revision=revision or None,
  )
  try:
    try:
      file = download(local_files_only=True)
    except FileNotFoundError:
      file = download()
  except Exception as error:  # from the hub, its HTTP client, or the disk
    kinds = [kind.__name__ for kind in type(error).__mro__]
    reason = next((text for name, text in REASONS.items() if name in kinds), None)
    if reason:
      raise UserError(f'{model}: {reason}; {by_hand}') from None
    message = _quoted(f'{kinds[0]}: {error}')
    raise OSError(f'{model} was not downloaded: {message}') from error
  return file, os.path.basename(os.path.dirname(file))


def _by_name(weights: Weights) -> dict[str, np.ndarray]:
  """Returns the tensors without prefixes and without batch counts."""
  found: dict[str, np.ndarray] = {}
  for key, value in weights.tensors.items():
    name = PREFIXES.sub('', key)
    if name in found:
      raise UserError(f'{weights.source} has {_quoted(name)} twice, under two prefixes')
    if not name.endswith('.num_batches_tracked'):
      found[name] = value
  return found


def _names(
  source: str, ours: Collection[str], found: Collection[str]
) -> tuple[Dialect, dict[str, str]]:
  """Returns the dialect of a file, and its names for everything in our trunk.

  Of the trunk's dialects, it is the one with the most names in the file.
  """
  trunk = {path: _split(path) for path in ours if path.startswith('trunk/')}
  layers = {layer for layer, _ in trunk.values()}
  known = []
  for dialect in DIALECTS:
    names = dialect.names(layers)
    if layers and names.keys() == layers:
      theirs = {p: f'{names[x]}.{LEAVES[leaf]}' for p, (x, leaf) in trunk.items()}
      known.append((len(set(theirs.values()) & set(found)), dialect, theirs))
  if not known:
    raise UserError(f'{source}: no published weights are known for such a network')
  _, dialect, names = max(known, key=lambda one: one[0])
  return dialect, names


def _split(path: str) -> tuple[str, str]:
  """Splits 'trunk/stage2_block1/norm3/scale' into (layer, leaf)."""
  layer, _, leaf = path.removeprefix('trunk/').rpartition('/')
  return layer, leaf


def _shape_there(
  dialect: Dialect, path: str, shape: tuple[int, ...]
) -> tuple[int, ...]:
  """Converts the shape that PyTorch would give our array to the dialect's shape."""
  layer, leaf = _split(path)
  other = dialect.shapes.get(layer) if leaf == 'kernel' else None
  return other(shape) if other else shape


def _fits(
  found: Mapping[str, np.ndarray],
  expected: Mapping[str, tuple[int, ...]],
  heads: Mapping[str, str],
) -> bool:
  """Returns whether our head is linear and has as many classes as the file's."""
  linear = heads.keys() == {path for path in expected if path.startswith('head/')}
  return linear and all(
    name in found and found[name].shape == expected[path]
    for path, name in heads.items()
  )


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape that PyTorch gives to an array with this shape here."""
  if len(shape) == 4:
    height, width, inputs, outputs = shape
    return outputs, inputs, height, width
  return shape[::-1]


def _check(
  source: str,
  expected: Mapping[str, tuple[int, ...]],
  found: Mapping[str, np.ndarray],
) -> None:
  """Rejects weights of another network, and impossible values."""
  wrong = {
    'missing': [name for name in expected if name not in found],
    'not of this network': [name for name in found if name not in expected],
    'of another shape': [
      name for name in expected if name in found and found[name].shape != expected[name]
    ],
  }
  faults = [(kind, names) for kind, names in wrong.items() if names]
  if faults:
    counts = ', '.join(f'{len(names)} {kind}' for kind, names in faults)
    kind, (first, *_) = faults[0]
    raise UserError(
      f'{source} is of another network: {_quoted(first)} is {kind} ({counts})'
    )
  for name, value in found.items():
    with np.errstate(over='ignore'):
      single = value.astype(np.float32)
    least = 0 if name.endswith('running_var') else -np.inf
    if value.dtype == np.int64 or not np.all(np.isfinite(single) & (single >= least)):
      raise UserError(f'{source}: {name} has values that weights cannot have')


def _quoted(text: str) -> str:
  """Returns text from a file or server, shortened and on one line."""
  return ascii(text if len(text) <= 120 else f'{text[:120]}...')


def _flat(tree: PyTree) -> list[tuple[tuple, Any]]:
  return jax.tree_util.tree_flatten_with_path(tree)[0]


def _path(keys: tuple) -> str:
  return jax.tree_util.keystr(keys, simple=True, separator='/')
