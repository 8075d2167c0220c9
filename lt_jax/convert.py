"""Converts PyTorch weights, which can run code, to files that hold only numbers.

  python -m lt_jax.convert --source=WEIGHTS.pth --out=WEIGHTS.safetensors

A PyTorch file is a program that makes tensors, and a hostile one can do anything. This
is the only place that reads one, and it allows nothing but plain tensors and
containers. If you do not trust the file, run this in a sandbox. Needs PyTorch 2.6 or
newer; the CPU build is enough: pip install torch.
"""

import hashlib
import os
import re
from typing import Any

from lt_jax import commands
from lt_jax.errors import UserError
from lt_jax.files import check_out, write_atomically
from lt_jax.pretrained.published import MOST_BYTES

SOURCE = commands.path_flag('source', 'The PyTorch file.')
OUT = commands.out_flag('The .safetensors file to write.')

WRAPPERS = ('state_dict', 'model', 'state_dict_best')
"""Keys under which training code stores weights, next to epoch or optimiser."""


def convert(source: str, out: str) -> int:
  """Writes the tensors of a PyTorch file as `.safetensors`.

  A name such as resnet50-0676ba61.pth contains the first digits of the file's SHA-256,
  which are then checked. Names, shapes and types of the tensors stay as they are.

  Args:
    source: a file that `torch.save` wrote.
    out: the file to write, whole or not at all.

  Returns:
    The number of tensors.

  Raises:
    UserError: PyTorch is missing or too old, a path is wrong, or the file is damaged or
      holds anything but tensors.
  """
  if not out.endswith('.safetensors'):
    raise UserError(f'--out is {out!r}; it must end in .safetensors')
  check_out(out)
  if not os.path.isfile(source):
    raise UserError(f'there is no file {source}')
  digest = _sha256(source)
  named = re.search(r'-([0-9a-f]{8,64})\.pth$', source)
  if named and not digest.startswith(named[1]):
    raise UserError(
      f'{source} is damaged: its digest {digest[:8]} does not match its name'
    )
  try:
    import torch
    from safetensors.torch import save
  except ImportError:
    raise UserError('converting needs PyTorch: pip install torch') from None
  if tuple(int(n) for n in torch.__version__.split('.')[:2]) < (2, 6):
    raise UserError(
      f'PyTorch is {torch.__version__}; reading files is unsafe before 2.6'
    )
  try:
    loaded = torch.load(source, map_location='cpu', weights_only=True)
  except Exception as error:  # many types; some advise loading without the guard
    raise UserError(
      f'{source} is damaged, or holds more than tensors: {type(error).__name__}'
    ) from None
  tensors = _unwrapped(loaded, torch.Tensor, source)
  size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
  if size > MOST_BYTES:  # a tiny file can claim to be this large
    raise UserError(f'{source} holds {size} bytes of tensors, too many for weights')
  try:
    dense = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    data = save(dense, {'source': os.path.basename(source), 'source_sha256': digest})
  except (RuntimeError, ValueError, KeyError) as error:
    raise UserError(f'{source} holds unusual tensors: {type(error).__name__}') from None
  write_atomically(out, data)
  return len(tensors)


def _unwrapped(loaded: Any, tensor: type, source: str) -> dict[str, Any]:
  """Returns the dict of tensors inside of what training code has saved."""
  for _ in WRAPPERS:  # a bounded loop, since a dict can contain itself
    inner = loaded if isinstance(loaded, dict) else {}
    wrapped = [inner[key] for key in WRAPPERS if isinstance(inner.get(key), dict)]
    loaded = wrapped[0] if wrapped else loaded
  if not isinstance(loaded, dict) or not loaded:
    raise UserError(f'{source} does not hold a dict of tensors')
  for name, value in loaded.items():
    if not isinstance(name, str) or not isinstance(value, tensor):
      raise UserError(
        f'{source}: {str(name)[:80]!a} is not a tensor; weights must be at the top '
        f'level or under {", ".join(WRAPPERS)}'
      )
  return loaded


def _sha256(path: str) -> str:
  """Returns the SHA-256 of a file in hexadecimal."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def main() -> None:
  """Converts the file named on the command line."""
  count = convert(SOURCE.value, OUT.value)
  print(f'{OUT.value}: {count} tensors')


if __name__ == '__main__':
  commands.launch(main, 'source', 'out')
