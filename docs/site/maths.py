"""Docstrings write maths as Sphinx reads it; this makes it what Markdown reads."""

import re
import textwrap
from typing import Any

import griffe

BLOCK = re.compile(r'^( *)\.\. math::(.*)\n((?:\1 +.*\n|\s*\n)*)', re.M)


def markdown(text: str) -> str:
  r"""Returns a docstring with `.. math::` as $$ and :math:`x` as $x$."""

  def block(found: re.Match) -> str:
    indent, first, rest = found.groups()
    body = f'{first.strip()}\n{textwrap.dedent(rest)}'.strip()
    if '&' in body or r'\\' in body:
      body = f'\\begin{{aligned}}\n{body}\n\\end{{aligned}}'
    return textwrap.indent(f'\n$$\n{body}\n$$\n', indent) + '\n'

  text = BLOCK.sub(block, text + '\n')
  return re.sub(r':math:`([^`]*)`', r'$\1$', text).rstrip()


class Maths(griffe.Extension):
  """Rewrites each docstring as it is found."""

  def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Is called by griffe once an object has its docstring."""
    if obj.docstring:
      obj.docstring.value = markdown(obj.docstring.value)
