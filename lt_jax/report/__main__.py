"""Writes the report of a run or of a folder of runs: python -m lt_jax.report DIR."""

from lt_jax import commands, files, report


def main(folder: str) -> None:
  """Writes the report and prints its path."""
  print(report.write(files.absolute(folder)))


if __name__ == '__main__':
  commands.launch(main, arguments=1)
