"""C-Mazes: a policy that is learned in plain mazes, and then meets others.

  python -m lt_jax.main --config=configs/c_mazes.py:dann --workdir=runs/mazes

An image shows a maze of 7x7 to 11x11 cells, an agent and a goal; the label is the next
move of an optimal planner. The source is plain; the compound target renders other mazes
in other colours (`tinted`), textures (`textured`) and walls (`outlined`), without
telling which; the open domains are `night` and `inverted`. Nothing is downloaded: all
mazes are made when a run starts, 13,000 images a domain in some two seconds.

Beside the accuracy of single moves a result has the success rate: the greedy policy is
played in 500 unseen mazes of every domain, the same ones in all, and fails after four
times the shortest path. Random moves and an optimal planner stand beside it. Of several
optimal moves the label is one, drawn at random, so that accuracy stays below 1.

There is no published number. Liu et al., Open Compound Domain Adaptation
(arXiv 1909.03403), report on mazes that were never released; these are our own.

Cost: 1,563 steps of 64 images, or 64 + 64; `source_only` takes some two minutes on two
CPU cores, `ocda` with its four stages several times as long.

Argument: a recipe of domain adaptation (see docs/methods.md) and
  target      tinted+textured+outlined (default), or any of the domains, joined by +
  train       10000 training images of every domain
  epochs      10; all schedules scale
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import Protocol, compound_rates, train_by

OPEN = ('night', 'inverted')
"""Domains that no training image is of."""


def training(epochs: float) -> Protocol:
  """Returns how policies are trained, for any recipe."""
  aligned = {'alignment': {'align_on': ('conv',)}}  # where a domain is still to be seen
  return Protocol(
    {
      'batch': 64,
      'eval_batch': 500,
      'epochs': epochs,
      'optimizer': {'name': 'adam'},
      'schedule': {'name': 'cosine', 'base': 0.005, 'end': epochs},
      'save_every_epochs': epochs / 5,
      'evaluate_every_epochs': epochs / 5,
    },
    recipes={'dan': aligned, 'jan': aligned, **compound_rates(10.0)},
  )


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'dann', 'source_only,epochs=3', ..."""
  recipe, option = parse_arg(
    arg,
    'dann',
    target='tinted+textured+outlined',
    train=10_000,
    epochs=10.0,
  )
  target = tuple(option.target.split('+'))
  opened = tuple(name for name in OPEN if name not in target)
  config = apply(
    base_config(),
    {
      'name': 'c_mazes',
      'task': 'mazes',
      'data': {
        'source': f'mazes:plain:{option.train}',
        'mean': (0.313,),  # of the source's training images
        'std': (0.298,),
      },
      'domains': {
        name: {'source': f'mazes:{name}:{option.train}'} for name in (*target, *opened)
      },
      'target': target,
      'open_domains': opened,
      'model': {'trunk': 'value_iteration'},
    },
  )
  return train_by(config, recipe, training(option.epochs))
