"""The page: puts what was read, counted and drawn into one template."""

import base64
import hashlib
import json
import os
import urllib.parse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from etils import epath

from lt_jax import files
from lt_jax.errors import UserError
from lt_jax.live import duration
from lt_jax.report import (
  differences,
  domain_figures,
  domains,
  drawing,
  figures,
  grids,
  insides,
  multitask,
  pictures,
  selection,
  sources,
  tables,
  templates,
  zero_shot,
)
from lt_jax.report.runs import (
  Group,
  NoData,
  NotApplicable,
  Run,
  find,
  grouped,
  methods,
  printable,
)
from lt_jax.screen import checkpoint_of

MOST_DRAWN = 20
"""With more groups, only the reports of their own folders have figures."""

REMARK = (
  'There are many methods; the report of each method’s own folder has its figures.'
)
NOT_DRAWN = (
  'Figures are drawn when the sweep ends; python -m lt_jax.report with this folder '
  'draws them now.'
)

MOST_SAMPLES = 32
MOST_TRANSLATIONS = 6
STANDALONE = (
  '<style>svg{color:#24292f}'
  '@media(prefers-color-scheme:dark){svg{color:#d7dde3}}</style>'
)
"""In its own file, a figure has no surrounding text to take a colour from."""


class Part(NamedTuple):
  """A table with its remarks.

  Attributes:
    anchor: its id on the page.
    title: its heading.
    table: the table.
    before: remarks above it.
    after: remarks below it.
    brief: what stands above it where nothing is grey, if that is not `before`.
  """

  anchor: str
  title: str
  table: tables.Table
  before: Sequence[str] = ()
  after: Sequence[str] = ()
  brief: Sequence[str] = ()

  @property
  def above(self) -> Sequence[str]:
    """The remarks above it in report.md and report.tex."""
    return self.brief or self.before


def write(folder: epath.PathLike, *, draw: bool = True) -> epath.Path:
  """Writes the report of a run, or of all runs beneath a folder, from their files.

  It also writes report.md, report.tex and figures/NAME.svg: the figures of a run, or
  those that compare several.

  Args:
    folder: a run's workdir, or a folder that contains some.
    draw: whether to draw figures, which takes seconds.

  Returns:
    The path of report.html.

  Raises:
    UserError: there is no run; or the folder cannot be written, in which case the
      `summary` is printed first.
    OSError: writing failed, for instance because the disk is full.
  """
  folder = files.absolute(folder)
  runs = find(folder)
  groups, notes = _grouped(runs, folder)
  alone = [run.folder for run in runs] == [folder]
  found = grids.grids(groups)
  parts = _parts(groups, found, notes, '' if alone else folder)
  sections = [_section(g, folder, alone, draw and len(groups)) for g in groups]
  compared = [] if len(groups) == 1 or not draw else _compared(groups)
  if found and draw:
    figure = grids.error_by_value
    errors = drawing.draw('error_by_value', figure, found, 'page')
    compared += [errors] * bool(errors.caption)
  page = _template().render(
    title=_title(runs, folder, alone),
    facts=_facts(runs[0]) if alone else [printable(f'{folder}')],
    alone=alone,
    parts=parts,
    figures=compared,
    sections=sections,
    samples=_samples(runs[0]) if alone and runs[0].task.picture is None else None,
    pictures=pictures.rows(runs[0]) if alone else [],
    colours=pictures.legend(runs[0]) if alone else [],
    translations=_translations(runs[0]) if alone else [],
    fonts=drawing.FONTS,
  )
  texts = {
    'report.md': '\n\n'.join(block for part in parts for block in _markdown(part)),
    'report.tex': '\n'.join(block for part in parts for block in _latex(part)),
    'report.html': page,
  }
  for figure in sections[0]['figures'] if alone else compared:
    if figure.svg:
      text = figure.svg.replace('>', f'>{STANDALONE}', 1)
      texts[f'figures/{figure.name}.svg'] = text
  try:
    files.make_folder(folder / 'figures')
    for name, text in texts.items():
      files.write_atomically(folder / name, text)
  except UserError:
    print(_summary(groups, notes))
    raise
  return folder / 'report.html'


def summary(folder: epath.PathLike) -> str:
  """Returns what a terminal shows: a short table, what a grid chose, and the notes.

  Args:
    folder: as for `write`.

  Raises:
    UserError: there is no run.
  """
  folder = files.absolute(folder)
  return _summary(*_grouped(find(folder), folder))


def _summary(groups: Sequence[Group], notes: Sequence[str]) -> str:
  told = [*grids.choices(grids.grids(groups)), *notes]
  return '\n'.join([tables.plain(tables.short_table(groups)), *told]).rstrip()


def _grouped(runs: Sequence[Run], folder: epath.Path) -> tuple[list[Group], list[str]]:
  """Returns groups of runs, and notes about them."""
  groups, notes = grouped(runs, methods(folder))
  losses = [f'{run.name}: {line}' for run in runs for line in run.losses]
  judges = domains.discriminator_notes(groups)
  return groups, [*notes, *_warnings(runs), *judges, *losses]


def _markdown(part: Part) -> list[str]:
  """Returns a table with its title and remarks as paragraphs of Markdown."""
  before, after = (map(tables.markdown_text, x) for x in (part.above, part.after))
  title = f'## {tables.markdown_text(part.title)}'
  return [title, *before, tables.markdown(part.table), *after]


def _latex(part: Part) -> list[str]:
  """Returns a table as LaTeX with its title and remarks as comments."""
  lines = [part.title, *part.above, *part.after]
  return [*(f'% {line}' for line in lines), tables.latex(part.table)]


def _parts(
  groups: list[Group],
  found: Sequence[grids.Grid],
  notes: Sequence[str],
  folder: epath.PathLike,
) -> list[Part]:
  """Returns the tables that have rows; the notes go below the first.

  Args:
    groups: of runs.
    found: the grids among them.
    notes: about the runs.
    folder: of the page, if it is not a run's own; '' for no links to runs.
  """

  def address(run: Run) -> str:
    return _address(run, folder) if folder else ''

  compared = differences.compare(groups)
  within_noise = differences.within_noise(compared)
  if folder or not groups[0].counted:
    results = tables.results_table(groups, within_noise, address)
  else:
    results = tables.metrics_table(groups[0].counted[0])
  by_domain = domains.domains_table(groups)
  by_source = sources.sources_table(groups)
  chosen = selection.selection_table(groups)
  parts = [
    Part('results', 'Results', results, [tables.units(groups)], notes),
    Part('domains', 'By domain', by_domain, domains.remarks(by_domain, groups)),
    Part('sources', 'By source', by_source, [sources.remark(by_source, groups)]),
    Part(
      'tasks',
      'By task',
      multitask.multitask_table(groups),
      [multitask.REMARK, *multitask.remarks(groups)],
    ),
    Part(
      'classes', 'By class', tables.classes_table(groups), [tables.by_class(groups)]
    ),
    Part(
      'differences',
      differences.title(compared),
      differences.differences_table(compared),
      [differences.remark(compared)],
      brief=[differences.brief(compared)],
    ),
    Part(
      'selection',
      'Which checkpoint would be chosen',
      chosen,
      [selection.remark(groups)],
      selection.rules(chosen),
    ),
    Part(
      'chosen', 'Chosen by validation', grids.grids_table(found), [grids.remark(found)]
    ),
    Part(
      'published',
      'Compared with published numbers',
      tables.published_table(groups),
      [tables.PUBLISHED],
    ),
  ]
  return [part for part in parts if part.table.rows]


def _title(runs: list[Run], folder: epath.Path, alone: bool) -> str:
  names = dict.fromkeys(run.config['name'] for run in runs if run.config)
  name = printable(', '.join(filter(None, names)) or folder.name)
  if alone:
    return f'{name}: {runs[0].recipe}, seed {runs[0].seed}'
  return f'{name}: {len(runs)} runs'


def _facts(run: Run) -> list[str]:
  """Describes a run in a few lines."""
  result = run.result
  lines = [f'{run.folder}: {run.state}']
  if result:
    chosen = result.get('threshold') or {}
    versions = (result.get('versions') or {}).items()
    tested = checkpoint_of(result)
    took = result.get('wall_seconds')
    time = '' if took is None else f', trained in {duration(took)}'
    lines += [
      f'{tested[:1].upper()}{tested[1:]}{time} on {result.get("device")}; '
      f'{", ".join(f"{k} {v}" for k, v in versions)}',
      f'Digest of the config {run.kind[0]}, of the checkpoint '
      f'{str(result.get("state_sha256"))[:16]}',
    ]
    if chosen.get('value') is not None:
      by = str(chosen.get('chosen_by'))
      lines.append(
        'An image counts as unknown if its known score is below '
        f'{chosen["value"]:.4g}: this threshold {CHOSEN_BY.get(by, f"is {by}")}'
      )
  if run.command:
    lines.append(f'Command: {run.command}')
  return [printable(line) for line in lines]


CHOSEN_BY = {
  'f_measure_oltr2020 on val and open_val': 'has the best open-set F (oltr2020) on '
  'validation images, which include unknown ones',
  'keeps 95 % of val': 'keeps 95 % of the validation images',
}
"""How result.json says that a threshold was chosen -> the end of a sentence."""


def _warnings(runs: list[Run]) -> list[str]:
  """Returns the warnings of all runs, each once."""
  runs_by_line: dict[str, list[str]] = {}
  for run in runs:
    for line in run.result.get('warnings') or ():
      runs_by_line.setdefault(line, []).append(run.name)
  return [
    printable(f'Warning of {names[0]}{_more(names)}: {line}')
    for line, names in runs_by_line.items()
  ]


def _more(names: list[str]) -> str:
  return f' and {len(names) - 1} more' if len(names) > 1 else ''


def _template() -> jinja2.Template:
  environment = templates.environment()
  script, *_ = environment.loader.get_source(environment, 'sort.js')
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  environment.globals |= {'zip': zip, 'script': script, 'script_digest': digest}
  return environment.get_template('template.html')


def _compared(groups: list[Group]) -> list[drawing.Figured]:
  """Draws the figures that compare methods, if any has finished."""
  if not any(group.counted for group in groups):
    return []
  wanted = figures.COMPARISONS
  if any(domains.domains(run) for group in groups for run in group.counted):
    wanted = wanted | domain_figures.COMPARISONS
  drawn = [drawing.draw(n, figure, groups, 'page') for n, figure in wanted.items()]
  return [figure for figure in drawn if figure.caption]


def _section(
  group: Group, folder: epath.Path, alone: bool, groups: int
) -> dict[str, Any]:
  """Returns what the page shows for a group of runs.

  Args:
    group: the runs.
    folder: of the page.
    alone: whether the page is of this one run.
    groups: number of groups; 0 to draw nothing.
  """
  links = [] if alone else [_address(run, folder) for run in group.runs]
  shown = group.counted or group.runs
  families = [figures]
  families += [domain_figures] * any(map(domains.domains, shown))
  families += [zero_shot] * any(map(zero_shot.has_views, shown))
  wanted: dict[str, Any] = {}
  for family in families:
    wanted |= family.FIGURES if 0 < groups <= MOST_DRAWN else {}
    wanted |= family.OF_ONE_RUN if alone else {}
  wanted |= _inside(group.runs[0]) if alone else {}
  drawn = [drawing.draw(n, f, shown, group.anchor) for n, f in wanted.items()]
  return {
    'group': group,
    'runs': None if alone else tables.runs_table(group.runs, links),
    'figures': [figure for figure in drawn if figure.caption],
    'command': '' if alone else printable(group.runs[0].command),
    'remark': '' if wanted else REMARK if groups else NOT_DRAWN,
    'config': json.dumps(group.runs[0].config, indent=1, sort_keys=True),
  }


def _inside(run: Run) -> dict[str, Any]:
  """Returns the figures of files that only some runs have."""
  return {
    name: figure
    for name, (file, figure) in (insides.FIGURES | domain_figures.OF_FILES).items()
    if (run.folder / file).exists()
  }


def _address(run: Run, folder: epath.PathLike) -> str:
  """Returns the address of a run's page, or else its folder, relative to the page."""
  below = os.fspath(run.folder).removeprefix(os.fspath(folder)).lstrip('/')
  page = 'report.html' if (run.folder / 'report.html').exists() else ''
  return urllib.parse.quote(f'{below or "."}/{page}', errors='surrogateescape')


def _samples(run: Run) -> dict[str, Any] | None:
  """Returns the worst errors on rare classes; None if the run has no images of them."""
  try:
    stored = run.arrays('samples.npz')
    if stored['image'].dtype != np.uint8:
      raise NotApplicable('float arrays are not images')
    names = run.class_names
    rows = zip(
      *(
        stored[n][:MOST_SAMPLES] for n in ('image', 'label', 'prediction', 'confidence')
      ),
      strict=True,
    )
    return {
      'missing': '',
      'images': [
        {
          'uri': pictures.uri(image),
          'caption': f'{names[label]}, taken for {names[prediction]} '
          f'({100 * confidence:.0f}\xa0%)',
        }
        for image, label, prediction, confidence in rows
      ],
    }
  except NotApplicable:
    return None
  except NoData as missing:
    return {'missing': str(missing), 'images': []}
  except (OSError, *drawing.OTHER_CONTENTS) as error:  # the arrays are not images
    return {'missing': f'samples.npz has unexpected contents ({error})', 'images': []}


def _translations(run: Run) -> list[dict[str, str]]:
  """Returns translated test images; [] if the method generates none."""
  try:
    stored = run.arrays('translations.npz')
    return [
      {'uri': pictures.uri(image), 'caption': name.replace('_', ' ')}
      for name in sorted(stored)
      for image in stored[name][:MOST_TRANSLATIONS]
    ]
  except (NoData, OSError, *drawing.OTHER_CONTENTS):
    return []
