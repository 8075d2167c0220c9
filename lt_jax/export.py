"""Exports the network of a run: python -m lt_jax.export --workdir=DIR --to=FORMAT.

  python -m lt_jax.export --workdir=runs/1 --to=safetensors --out=digits.safetensors
  python -m lt_jax.export --workdir=runs/1 --to=stablehlo --out=digits.stablehlo

safetensors: parameters, statistics and everything else the method needs to predict, as
arrays by path; the header has class names, preprocessing, config and digests. `load`
rebuilds the network.

stablehlo: the prediction itself as a program, for CPU, CUDA and TPU and any batch size,
from images as stored (uint8, or float32 features) to outputs. `jax.export.deserialize`
reads it without this library. Next to it, digits.stablehlo.json has class names,
preprocessing and the names of the outputs.

Every file is read back after writing, and must predict what the run predicts.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from lt_jax import checkpoint, commands, files, sharding, trained
from lt_jax.config import config_digest, upgraded
from lt_jax.errors import UserError, lookup
from lt_jax.method import Outputs
from lt_jax.pretrained import ours
from lt_jax.train import state_shapes
from lt_jax.trained import Trained

WORKDIR, WHICH = commands.workdir_flag(), commands.which_flag()
OUT = commands.out_flag('The file to write; it ends in .safetensors or .stablehlo.')
TO = flags.DEFINE_string('to', None, 'The format, safetensors or stablehlo.')

FIELDS = ('params', 'stats', 'memory')
"""Fields of a State that prediction needs."""

STRINGS = ('recipe', 'stage', 'image_dtype', 'config_digest', 'state_sha256', 'sha256')
"""Keys of a header whose values are plain strings; other values are JSON."""

PLATFORMS = ('cpu', 'cuda', 'tpu')

MOST_OFF = 1e-3
"""Largest difference allowed from the run's outputs, over their largest value."""


def main() -> None:
  """Exports the network that the flags name."""
  export(files.absolute(WORKDIR.value), TO.value, OUT.value, which=WHICH.value)


def export(
  workdir: epath.Path, to: str, out: epath.PathLike, *, which: str | None = None
) -> dict[str, Any]:
  """Writes the network of a run to a file, reads it back and compares predictions.

  Args:
    workdir: the run's folder.
    to: a key of `FORMATS`.
    out: the file to write, whole or not at all; its suffix must be the format.
    which: 'last' or 'best'; None for the State behind the run's result.

  Returns:
    The contents of the file's header, or of the .json next to it.

  Raises:
    UserError: a path is wrong, the run is damaged, or the file that was read back does
      not predict what the run predicts.
  """
  write = lookup(FORMATS, 'format', to)
  out = epath.Path(out)
  if out.suffix != f'.{to}':
    raise UserError(f'--out is {out}; it must end in .{to}')
  beside = [out.with_name(f'{out.name}.json')] if to == 'stablehlo' else []
  for path in (out, *beside):
    files.check_out(path)
  network = trained.open_run(workdir, which)
  network.check_whole(workdir)
  draft = out.with_name(f'.{out.name}.{uuid.uuid4().hex}.draft')
  try:
    header, predict = write(network, draft)
    off = difference(network, predict)
    if not off <= MOST_OFF:  # also refuses NaN
      raise UserError(
        f'{out} is not written: read back, its predictions differ from the run by '
        f'{off:.2g} of the largest output'
      )
    draft.replace(out)
  finally:
    draft.unlink(missing_ok=True)
  for path in beside:
    files.write_json(path, header)
  size = out.stat().length
  print(f'{out}: {size:,} bytes, checked: within {off:.1g} of what the run predicts')
  if network.of_several_domains:
    print(f'images: {network.predicts_by}')
  return header


def difference(network: Trained, predict: Callable[[np.ndarray], Outputs]) -> float:
  """Returns how far predictions are from those of a network, on images of noise.

  Args:
    network: the network.
    predict: images (B, H, W, channels) -> what `Trained.predict` returns.

  Returns:
    The largest difference of an output, relative to the largest magnitude of it.
  """
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (3, *network.facts['image_shape']), np.uint8)
  images[0] = images[0] // 64 + 100  # nearly flat
  images = images.astype(network.dtype)
  own = jax.device_get(jax.jit(network.predict)(network.state, images))
  other = jax.device_get(predict(images))
  off = [
    np.abs(np.asarray(other[name], np.float64) - value).max()
    / max(np.abs(value).max(), np.finfo(np.float32).tiny)
    for name, value in own.items()
  ]
  return float(np.max(off))  # NaN if any of them is


OF_CLASSES = ('unseen', 'val_classes', 'class_vectors')
"""Facts that exist only if classes are described."""


def facts(network: Trained) -> dict[str, Any]:
  """Returns what a user or a program needs to know to use a network, as plain data."""
  return {
    'class_names': list(network.class_names),
    'image_shape': list(network.facts['image_shape']),
    'image_dtype': network.dtype.name,
    'preprocessing': network.facts['preprocessing'],
    'threshold': network.facts.get('threshold'),
    'counts': network.facts['counts'],
    **{name: network.facts[name] for name in OF_CLASSES if name in network.facts},
    'recipe': network.config['recipe'],
    'uses_target_labels': bool(network.result.get('uses_target_labels'))
    or ours.used_target_labels(network.config['init']),
    'seed': network.config['seed'],
    'stage': network.stage.name,
    'step': network.step,
    'config_digest': config_digest(network.config),
    'state_sha256': checkpoint.digest(network.state),
  }


def _safetensors(
  network: Trained, path: epath.Path
) -> tuple[dict[str, Any], Callable[[np.ndarray], Outputs]]:
  """Writes arrays; returns (the header, a function that predicts with the file)."""
  from safetensors.numpy import save

  held = jax.device_get({name: getattr(network.state, name) for name in FIELDS})
  leaves = jax.tree_util.tree_flatten_with_path(held)[0]
  tensors = {_name(keys): np.array(leaf, order='C') for keys, leaf in leaves}
  header = facts(network) | {'config': network.config, 'sha256': _digest(tensors)}
  texts = {
    key: value if isinstance(value, str) else json.dumps(value)
    for key, value in header.items()
  }
  files.write_atomically(path, save(tensors, texts))
  loaded = load(path)
  predict = jax.jit(loaded.predict)
  return header, lambda images: predict(loaded.state, images)


def load(path: epath.PathLike) -> Trained:
  """Rebuilds the network of an exported .safetensors file; its run is not needed.

  Returns:
    A network for prediction. Its State has no optimiser and not the key of its run.

  Raises:
    UserError: the file is damaged, or its arrays contradict its header.
  """
  texts, tensors = _read(epath.Path(path))
  try:
    header = {k: v if k in STRINGS else json.loads(v) for k, v in texts.items()}
    stored, step, sha256 = header['config'], header['step'], header['sha256']
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f'{path} was not exported here: {error}') from None
  files.check_fits(header, trained.FACTS | {'config': dict, 'step': int}, path)
  config = header['config'] = trained.checked_config(upgraded(stored), path)
  if sha256 != _digest(tensors):
    raise UserError(f'{path} is damaged: its arrays do not have the recorded digest')
  experiment = trained.build_without_data(config, header)
  *_, stage = experiment.stages.values()
  shapes = state_shapes(stage.method, stage.streams)
  held = {name: getattr(shapes, name) for name in FIELDS}
  held = sharding.put_replicated(
    experiment.mesh, put_back(tensors, held, os.fspath(path))
  )
  state = shapes.replace(step=np.int32(step), key=jax.random.key(0), opt={}, **held)
  by = experiment.predicts_by
  return Trained(config, header, {}, stage, experiment.mesh, state, step, True, by)


def put_back(tensors: Mapping[str, np.ndarray], tree: Any, source: str) -> Any:
  """Returns a tree with its leaves replaced by arrays, found by their paths.

  Args:
    tensors: path -> array, such as 'params.net.head.kernel'.
    tree: leaves with shapes and types.
    source: where the arrays are from, for messages.

  Raises:
    UserError: a path, shape or type does not match.
  """
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  shapes = {_name(keys): (leaf.shape, leaf.dtype) for keys, leaf in leaves}
  found = {name: (value.shape, value.dtype) for name, value in tensors.items()}
  for name in sorted(shapes.keys() | found.keys()):
    if shapes.get(name) != found.get(name):
      there, here = (
        '{1} of shape {0}'.format(*of[name]) if name in of else 'absent'
        for of in (found, shapes)
      )
      raise UserError(f'{source}: {name} is {there} there and {here} in the network')
  return jax.tree_util.tree_map_with_path(lambda keys, _: tensors[_name(keys)], tree)


def _name(keys: tuple) -> str:
  return jax.tree_util.keystr(keys, simple=True, separator='.')


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
  """Returns the SHA-256 of arrays, with names, shapes and types."""
  total = hashlib.sha256()
  for name, value in sorted(tensors.items()):
    total.update(f'{name} {value.shape} {value.dtype}\n'.encode())
    total.update(value.tobytes())
  return total.hexdigest()


def _read(path: epath.Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
  """Returns (header, name -> array) of a .safetensors file."""
  import safetensors
  from safetensors.numpy import load as parse

  try:
    data = path.read_bytes()
    tensors = parse(data)
    length = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + length]).get('__metadata__', {})
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from None
  except (safetensors.SafetensorError, ValueError, KeyError) as error:
    reason = ' '.join(str(error).split())
    raise UserError(f'{path} is damaged, or no .safetensors file: {reason}') from None
  return header, tensors


def _stablehlo(
  network: Trained, path: epath.Path
) -> tuple[dict[str, Any], Callable[[np.ndarray], Outputs]]:
  """Writes a program; returns (the .json, a function that predicts with the file)."""
  from jax import export as jax_export

  # On no mesh, since a program for a mesh runs only on that number of devices.
  held = {name: getattr(network.state, name) for name in FIELDS}
  state = network.state.replace(opt={}, **jax.device_get(held))

  def predict(images: jax.Array) -> Outputs:
    return network.predict(state, images)

  sizes = ','.join(map(str, network.facts['image_shape']))
  shape = jax_export.symbolic_shape(f'batch,{sizes}')
  program = jax_export.export(jax.jit(predict), platforms=PLATFORMS)(
    jax.ShapeDtypeStruct(shape, network.dtype)
  )
  files.write_atomically(path, program.serialize())
  loaded = jax_export.deserialize(bytearray(path.read_bytes()))
  outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
  header = facts(network) | {
    'input': {
      'shape': ['batch', *network.facts['image_shape']],
      'dtype': network.dtype.name,
    },
    'outputs': {
      name: {
        'shape': [str(n) if n == shape[0] else n for n in x.shape],
        'dtype': str(x.dtype),
      }
      for name, x in outputs.items()
    },
    'platforms': list(PLATFORMS),
    'jax': jax.__version__,
    'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
  }
  return header, loaded.call


FORMATS = {'safetensors': _safetensors, 'stablehlo': _stablehlo}
"""name -> (network, path) -> (facts, a function that predicts with the file)."""


if __name__ == '__main__':
  commands.launch(main, 'workdir', 'to', 'out')
