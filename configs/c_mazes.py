"""C-Mazes: a policy learned in plain mazes, adapted to mazes that look different.

  python -m lt_jax.main --config=configs/c_mazes.py:dann --workdir=runs/mazes

Each image shows a maze of 7x7 to 11x11 cells, an agent and a goal; the label is the
next move of an optimal planner. The source is plain. The compound target draws other
mazes with other colours (`tinted`), textures (`textured`) and walls (`outlined`),
without saying which; the open domains are `night` and `inverted`. Nothing is
downloaded: all mazes are generated when a run starts, 13,000 images per domain in about
two seconds.

Besides the accuracy of single moves, a result has the success rate. The greedy policy
plays 500 unseen mazes, the same ones in every domain, and fails if it takes more than
four times the shortest path. Random moves and an optimal planner are reported for
comparison. Where several moves are optimal, the label is one of them drawn at random,
so accuracy stays below 1.

There is no published number. Liu et al., Open Compound Domain Adaptation (arXiv
1909.03403), report on mazes that were never released; these are our own.

Cost: 1,563 steps of 64 images, or 64 + 64. `source_only` takes about two minutes on two
CPU cores; `ocda`, with its four stages, takes several times as long.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  target      tinted+textured+outlined (default), or any of the domains, joined by +
  train       10000 training images per domain
  epochs      10; all schedules scale with it
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import Protocol, compound_rates, train_by

OPEN = ('night', 'inverted')
"""Domains without training images."""


def training(epochs: float) -> Protocol:
  """Returns how policies are trained, for any recipe."""
  aligned = {'alignment': {'align_on': ('conv',)}}  # where domains still differ
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
