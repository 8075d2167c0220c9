"""Office-Caltech10 with SURF features: four domains, twelve pairs, mostly no training.

  python -m lt_jax.main --config=configs/office_caltech10.py:nearest_neighbour \
    --workdir=runs/office_caltech10

Data: the features of Gong et al., histograms of 800 visual words, as one .npz of pairs
x_DOMAIN (N, 800) and y_DOMAIN, where DOMAIN is caltech (1,123 images), amazon (958),
webcam (295) or dslr (157), and `classes`: office_caltech10_surf.npz in the working
directory, or features=FILE. The authors publish one .mat per domain, with `fts` and
`labels`. As in the literature, each histogram is divided by its sum, every feature is
standardised in each domain separately, and all images of both domains are used: those
of the target without labels for training, and all of them for testing.

Published accuracy in % of the nearest neighbour after this (Gong et al., Geodesic Flow
Kernel, CVPR 2012, as repeated by later papers); domains by their first letters:

  C>A   C>W   C>D   A>C   A>W   A>D   W>C   W>A   W>D   D>C   D>A   D>W
  23.70 25.76 25.48 26.00 29.83 25.48 19.86 22.96 59.24 26.27 28.50 63.39

To run all pairs and compare the methods: python -m benchmarks.pairs office_caltech10

Cost: a few seconds per pair without training; a linear head (source_only) trains for
100 epochs.

Argument: a recipe without training (nearest_neighbour, linear_svm, sa, sa_oracle,
  coral_shallow), or one that trains a linear head (source_only, target_only,
  deep_coral, entropy, mcc), and
  source      caltech (default), amazon, webcam or dslr
  target      amazon (default), likewise
  classifier  of sa and coral_shallow: nearest_neighbour (default) or linear_svm
  features    the file
  epochs      100, for recipes that train
"""

from ml_collections import ConfigDict

from lt_jax.config import Overrides, apply, base_config, parse_arg
from lt_jax.errors import UserError, lookup
from lt_jax.protocols import Protocol, train_by
from lt_jax.recipes import adaptation, parts

DOMAINS = ('caltech', 'amazon', 'webcam', 'dslr')


def untrained(classifier: str) -> dict[str, Overrides]:
  """Returns the overrides of recipes without training: no steps, and a classifier.

  Args:
    classifier: what recipes that first align the domains fit after that.
  """
  lookup(parts.SHALLOW, 'classifier', classifier)
  stages = {
    'sa': ('sa', adaptation.subspaces(classifier)),
    'sa_oracle': ('sa', adaptation.subspaces(classifier, choose_by='oracle')),
    'coral_shallow': ('coral', adaptation.coral_shallow(classifier)),
  }
  no_steps = {'epochs': 0.0}
  return {
    **{name: {'stages': {'train': no_steps}} for name in parts.SHALLOW},
    **{
      name: {
        'stages': {
          'source': no_steps,
          stage: {**own, 'wrappers': ConfigDict(own['wrappers'])},  # replaces the dict
        }
      }
      for name, (stage, own) in stages.items()
    },
  }


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'sa,source=dslr,target=webcam', ..."""
  recipe, option = parse_arg(
    arg,
    'nearest_neighbour',
    source='caltech',
    target='amazon',
    classifier='nearest_neighbour',
    features='office_caltech10_surf.npz',
    epochs=100.0,
  )
  for name in (option.source, option.target):
    lookup(dict.fromkeys(DOMAINS), 'domain', name)
  if option.source == option.target:
    raise UserError(f'source and target are both {option.source}')

  def split(name: str) -> Overrides:
    source = f'npz:{option.features}'
    return {'source': source, 'train_split': name, 'test_split': name}

  config = apply(
    base_config(),
    {
      'name': 'office_caltech10',
      'data': {'unit': 'l1', 'standardise': True},
      'domains': {name: split(name) for name in (option.source, option.target)},
      'sources': (option.source,),
      'target': (option.target,),
    },
  )
  training = Protocol(
    {
      'batch': 32,
      'eval_batch': 500,
      'epochs': option.epochs,
      'schedule': {'name': 'cosine', 'base': 0.01, 'end': option.epochs},
      'save_every_epochs': option.epochs,
      'evaluate_every_epochs': option.epochs,
      'model': {'trunk': 'identity'},
    },
    recipes=untrained(option.classifier),
  )
  return train_by(config, recipe, training)
