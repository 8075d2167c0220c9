"""Writes the report of a run or of a folder of runs: python -m lt_jax.report DIR.

DIR is the folder of a run, or holds any number of runs, such as a sweep. It gets
report.html, a page with all tables and figures that opens without a network; report.md
and report.tex, its tables as Markdown and LaTeX; and figures/NAME.svg. Only files of
the runs are read: nothing is trained or evaluated.
"""

from lt_jax import commands, files, report


def main(folder: str) -> None:
  """Writes the report and prints its path."""
  print(report.write(files.absolute(folder)))


if __name__ == '__main__':
  commands.launch(main, arguments=1, wanted='the folder of a run or of several runs')
