"""Prepares a TFDS data set once: python -m lt_jax.prepare cifar10 [--data_dir=DIR].

Downloads it and writes it in ArrayRecord format, which training reads without
TensorFlow. Needs the extra: pip install 'lt_jax[prepare]'.
"""

from absl import flags

from lt_jax import commands
from lt_jax.errors import UserError

DATA_DIR = flags.DEFINE_string('data_dir', None, "The folder; TFDS's own by default.")


def prepare(name: str, data_dir: str | None = None) -> None:
  """Downloads a TFDS data set and writes it in ArrayRecord format.

  Args:
    name: of the data set, such as 'cifar10'.
    data_dir: where it goes; None is TFDS's default.

  Raises:
    UserError: TensorFlow is not installed.
  """
  try:
    import tensorflow  # noqa: F401 (TFDS needs it to prepare, not to read)
  except ImportError:
    raise UserError(
      "preparing a data set needs TensorFlow: pip install 'lt_jax[prepare]'"
    ) from None
  import tensorflow_datasets as tfds

  from lt_jax.data.sources import load_source, store_labels

  builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  builder.download_and_prepare()
  store_labels(load_source(f'tfds:{name}', data_dir))


def main(name: str) -> None:
  """Prepares the data set named on the command line."""
  prepare(name, DATA_DIR.value)


if __name__ == '__main__':
  commands.launch(main, arguments=1)
