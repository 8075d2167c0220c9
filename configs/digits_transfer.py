r"""Embedded transfer tasks: digits as sources and targets, with no download.

  python -m lt_jax.main --config=configs/digits_transfer.py:frozen --workdir=runs/a

A run has two parts: the stage `source` trains on digits of one half of scikit-learn's
1,797, then the recipe fine-tunes on a few images per class of the other half. No digit
is in both. The tasks are those of lt_jax/data/digit_tasks.py.

One command runs the ablation over sources: the union of two sources, each of them
alone, and the source classes that `lt_jax.similarity` kept for the target:

  python -m lt_jax.sweep --config=configs/digits_transfer.py:keep=keep_classes.txt \
    --methods=frozen,ce --grid=stages.source.domain=source,round,straight,kept \
    --workdir=runs/sources

`python -m lt_jax.evaluate --workdir=RUN --stage=source` evaluates the first stage; for
the union, on the test images of each of its sources.

There is no published number.

Cost: 375 steps of 32 images on the source and 125 on the target, half a minute on two
CPU cores.

Argument: a recipe (see docs/methods.md; `ce` fine-tunes everything) and
  target    fine (default), coarse, parity or one
  source    source (default), the union of round and straight; either of these; or kept
  keep      the classes of kept: a file with one name per line, or names like 0+3+6
  shots     10, training images per class of the target
  imbalance 1, of the target's training images
  epochs    40, on the target; schedules scale with it
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import Protocol, cosine
from lt_jax.protocols.transfer import transferred

SOURCES = ('round', 'straight')


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'frozen', 'ldam_drw,target=coarse', ..."""
  recipe, option = parse_arg(
    arg,
    'frozen',
    target='fine',
    source='source',
    keep='',
    shots=10,
    imbalance=1.0,
    epochs=40.0,
  )
  domains = {
    'task': {
      'source': f'digits_tasks:{option.target}',
      'profile': 'exponential' if option.imbalance > 1 else 'balanced',
      'n_max': option.shots,
      'imbalance': option.imbalance,
    },
    **{name: {'source': f'digits_tasks:{name}'} for name in SOURCES},
  }
  if option.keep or option.source == 'kept':
    domains['kept'] = {'source': 'digits_tasks:digits', 'keep_classes': option.keep}
  config = apply(
    base_config(),
    {
      'name': 'digits_transfer',
      'data': {
        'mean': (0.306,),
        'std': (0.377,),
        'pad': 1,
        'many_shot': 8,
        'few_shot': 4,
      },
      'domains': domains,
      'sources': SOURCES,
      'domain': 'task',
    },
  )
  protocol = Protocol(
    {
      'batch': 32,
      'eval_batch': 64,
      **cosine(40.0, base=0.05),
      'save_every_epochs': 20.0,
      'evaluate_every_epochs': 20.0,
      'model': {'trunk': 'digits_cnn'},
    }
  )
  source = {
    'domain': option.source,
    'epochs': 20.0,
    'schedule': {'name': 'cosine', 'base': 0.05, 'end': 20.0},
  }
  return transferred(config, recipe, protocol, source, option.epochs)
