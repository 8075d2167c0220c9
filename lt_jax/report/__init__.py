"""One page about a run or a folder of runs, from the files they left.

`write` writes report.html, which embeds its figures and needs no network; its tables as
report.md and report.tex; and figures/NAME.svg for a paper or a README. No model runs
again. If a file is missing or damaged, its figure is left out and the page says why.
`summary` is a short table for a terminal.
"""

from lt_jax.report.page import summary, write

__all__ = ['summary', 'write']
