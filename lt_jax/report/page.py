"""The page: what was read, counted and drawn, through one template."""

import json
import os
import urllib.parse
from typing import Any

import jinja2
import numpy as np
from etils import epath

from lt_jax import files
from lt_jax.errors import UserError
from lt_jax.report import (
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
  zero_shot,
)
from lt_jax.report.runs import Group, NoData, Run, find, grouped, printable

MOST_DRAWN = 20
"""Groups up to which each has figures; of more, the reports of their folders have."""

REMARK = 'There are many methods: the report of a method’s own folder has its figures.'

MOST_SAMPLES = 32
MOST_TRANSLATIONS = 6
STANDALONE = (
  '<style>svg{color:#24292f}'
  '@media(prefers-color-scheme:dark){svg{color:#d7dde3}}</style>'
)
"""In a file of its own a figure has no text around it to take a colour from."""


def write(folder: epath.PathLike) -> epath.Path:
  """Writes the report of a run, or of all runs beneath a folder, from their files.

  Beside report.html go report.md and report.tex, and as figures/NAME.svg the figures of
  a run, or those that compare several.

  Args:
    folder: a run's workdir, or one that holds such.

  Returns:
    The path of report.html.

  Raises:
    UserError: there is no run; or the folder cannot be written, after showing the
      tables.
    OSError: writing failed, as on a full disk.
  """
  folder = files.absolute(folder)
  runs = find(folder)
  groups, notes = grouped(runs)
  alone = runs[0].folder == folder
  losses = [f'{run.name}: {line}' for run in runs for line in run.losses]
  judges = domains.discriminator_notes(groups)
  controls = multitask.remarks(groups)
  by_source = sources.sources_table(groups)
  notes = [*notes, *_warnings(runs), *judges, *losses]
  results, published = tables.results_table(groups), tables.published_table(groups)
  by_domain = domains.domains_table(groups)
  by_class = tables.classes_table(groups)
  selected = selection.selection_table(groups)
  tasks = multitask.multitask_table(groups)
  found = grids.grids(groups)
  chosen = grids.grids_table(found)
  sections = [_section(group, folder, alone, len(groups)) for group in groups]
  compared = [] if len(groups) == 1 else _compared(groups)
  if found:
    figure = grids.error_by_value
    compared.append(drawing.draw('error_by_value', figure, found, 'page'))
  page = _template().render(
    title=_title(runs, folder, alone),
    facts=_facts(runs[0]) if alone else [printable(f'{folder}')],
    alone=alone,
    results=results,
    published=published,
    domains=by_domain,
    classes=by_class,
    domain_remarks=domains.remarks(by_domain),
    selection=selected,
    sources=by_source,
    source_remark=sources.TOLD,
    tasks=tasks,
    task_remarks=controls,
    chosen=chosen,
    remarks=[tables.UNITS, *notes],
    figures=compared,
    sections=sections,
    samples=_samples(runs[0]) if alone and runs[0].task.picture is None else None,
    pictures=pictures.rows(runs[0]) if alone else [],
    colours=pictures.legend(runs[0]) if alone else [],
    translations=_translations(runs[0]) if alone else [],
  )
  shown = [results, by_domain, by_source, by_class, tasks, selected, chosen, published]
  shown = [table for table in shown if table.rows]
  remarks = [tables.UNITS, *domains.remarks(by_domain), *controls, *notes]
  plain = [*map(tables.markdown_text, remarks), *map(tables.markdown, shown)]
  latex = [*(f'% {remark}' for remark in remarks), *map(tables.latex, shown)]
  texts = {
    'report.md': '\n\n'.join(plain),
    'report.tex': '\n'.join(latex),
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
    print(texts['report.md'])
    raise
  return folder / 'report.html'


def _title(runs: list[Run], folder: epath.Path, alone: bool) -> str:
  names = dict.fromkeys(run.config['name'] for run in runs if run.config)
  name = printable(', '.join(filter(None, names)) or folder.name)
  if alone:
    return f'{name}: {runs[0].recipe}, seed {runs[0].seed}'
  return f'{name}: {len(runs)} runs'


def _facts(run: Run) -> list[str]:
  """Says in a few lines what a run was, and where."""
  result = run.result
  told = [f'{run.folder}: {run.state}']
  if result:
    chosen = result.get('threshold') or {}
    versions = (result.get('versions') or {}).items()
    told += [
      f'Stage {result.get("stage")}, step {result.get("step")}, '
      f'State by {result.get("select")}; {result.get("wall_seconds")} s on '
      f'{result.get("device")}; {", ".join(f"{k} {v}" for k, v in versions)}',
      f'Configuration {run.kind[0]}, state {str(result.get("state_sha256"))[:16]}',
    ]
    if chosen.get('value') is not None:
      told.append(
        f'Threshold of the open set: {chosen["value"]:.4g}, {chosen.get("chosen_by")}'
      )
  return [printable(line) for line in told]


def _warnings(runs: list[Run]) -> list[str]:
  """Returns what runs warn of, each warning once."""
  names: dict[str, list[str]] = {}
  for run in runs:
    for line in run.result.get('warnings') or ():
      names.setdefault(line, []).append(run.name)
  return [
    printable(f'Warning of {some[0]}{f" and {len(some) - 1} more" * (len(some) > 1)}: ')
    + printable(line)
    for line, some in names.items()
  ]


def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('lt_jax.report', '.'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.globals['zip'] = zip
  return environment.get_template('template.html')


def _compared(groups: list[Group]) -> list[drawing.Figured]:
  """Draws methods beside each other, if any has finished."""
  if not any(group.counted for group in groups):
    return []
  wanted = figures.COMPARISONS
  if any(domains.domains(run) for group in groups for run in group.counted):
    wanted = wanted | domain_figures.COMPARISONS
  return [drawing.draw(n, figure, groups, 'page') for n, figure in wanted.items()]


def _section(
  group: Group, folder: epath.Path, alone: bool, groups: int
) -> dict[str, Any]:
  """Returns what the page shows of a group of runs."""
  links = [
    _link(run.folder / 'report.html', folder)
    if not alone and (run.folder / 'report.html').exists()
    else ''
    for run in group.runs
  ]
  shown = group.counted or group.runs
  families = [figures]
  families += [domain_figures] * any(map(domains.domains, shown))
  families += [zero_shot] * any(map(zero_shot.has_views, shown))
  wanted: dict[str, Any] = {}
  for family in families:
    wanted |= family.FIGURES if groups <= MOST_DRAWN else {}
    wanted |= family.OF_ONE_RUN if alone else {}
  wanted |= _inside(group.runs[0]) if alone else {}
  drawn = [drawing.draw(n, f, shown, group.anchor) for n, f in wanted.items()]
  return {
    'group': group,
    'runs': None if alone else tables.runs_table(group.runs, links),
    'figures': drawn,
    'remark': '' if wanted else REMARK,
    'config': json.dumps(group.runs[0].config, indent=1, sort_keys=True),
  }


def _inside(run: Run) -> dict[str, Any]:
  """Returns the figures of files that not every run has."""
  return {
    name: figure
    for name, (file, figure) in (insides.FIGURES | domain_figures.OF_FILES).items()
    if (run.folder / file).exists()
  }


def _link(path: epath.Path, folder: epath.Path) -> str:
  """Returns the address of a file, from a page in a folder."""
  below = os.fspath(path).removeprefix(os.fspath(folder)).lstrip('/')
  return urllib.parse.quote(below, errors='surrogateescape')


def _samples(run: Run) -> dict[str, Any]:
  """Returns the worst errors on rare classes, and what they were taken for."""
  try:
    stored = run.arrays('samples.npz')
    if stored['image'].dtype != np.uint8:
      raise NoData('the run learned from float arrays, which are no pictures')
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
          'label': names[label],
          'prediction': names[prediction],
          'confidence': f'{100 * confidence:.0f}',
        }
        for image, label, prediction, confidence in rows
      ],
    }
  except NoData as missing:
    return {'missing': str(missing), 'images': []}
  except (OSError, *drawing.OTHER_CONTENTS) as error:  # no image can be made of it
    return {'missing': f'samples.npz holds something else ({error})', 'images': []}


def _translations(run: Run) -> list[dict[str, str]]:
  """Returns test images and what the method draws of them; [] if it draws nothing."""
  try:
    stored = run.arrays('translations.npz')
    return [
      {'uri': pictures.uri(image), 'name': name.replace('_', ' ')}
      for name in sorted(stored)
      for image in stored[name][:MOST_TRANSLATIONS]
    ]
  except (NoData, OSError, *drawing.OTHER_CONTENTS):
    return []
