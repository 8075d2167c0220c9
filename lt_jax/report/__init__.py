"""One page about a run or a folder of runs, from the files they left.

`write` makes report.html, which holds its figures and needs no network; report.md and
report.tex, its tables; and figures/NAME.svg, for a paper or a README. No model runs
again. A file that is missing or damaged costs its figure, and the page says so.
"""

from lt_jax.report.page import write

__all__ = ['write']
