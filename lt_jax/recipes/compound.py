"""Recipes of open compound domain adaptation and its ablations.

The stages and their learning rates follow the authors' code, where each stage is a long
training; `lt_jax.methods.compound` describes them. All recipes here share every stage
but the last, so differences come only from the last stage. Only the oracle also has
different domain features.

With label maps, the same names have their own stages, see `_of_pixels`.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from lt_jax.config import Overrides
from lt_jax.errors import UserError
from lt_jax.recipes import segmentation
from lt_jax.recipes.parts import Recipe, copy, target_stream

ADAM: Overrides = {'name': 'adam', 'weight_decay': (('.*', 0.0),)}

NETWORK_ONLY = copy('net/.*', 'source')


def _player(network: Overrides, schedule: ConfigDict, share: float = 1.0) -> Overrides:
  """A player whose learning rate is a fraction of its stage's."""
  follows = {key: schedule.get_ref(key) for key in schedule}
  return {
    'network': network,
    'optimizer': {'name': 'adam'},
    'schedule': {**follows, 'base': schedule.get_ref('base') * share},
  }


def _stage(schedule: ConfigDict, **changes: Any) -> Overrides:
  """A stage trained by Adam that keeps its last State."""
  return {'optimizer': ADAM, 'schedule': schedule, 'select': 'last', **changes}


def _adversarial(config: ConfigDict, form: str, schedule: ConfigDict, **changes: Any):
  """Adapts a copy of the source's network, with features enriched by a fusion."""
  return _stage(
    schedule,
    **{
      **target_stream(config),
      'method': {'name': 'compound', 'threshold': 0.6},
      'alignment': {'align_on': ('logits',)},
      'players': {
        'discriminator': _player({'name': 'mlp', 'hidden': (500, 500)}, schedule),
        'fusion': _player({'name': 'fusion', 'form': form}, schedule, 0.1),
      },
      'surgeries': (
        NETWORK_ONLY,
        copy('source_net/(.*)', 'source', source=r'net/\1'),
        copy('fusion/classifier/(.*)', 'source', source=r'net/head/\1'),
        copy('centroids', 'centroids'),
      ),
      **changes,
    },
  )


def _ocda(
  config: ConfigDict,
  *,
  form: str = 'paper',
  near_first: bool = True,
  oracle: bool = False,
  repo_quirks: bool = False,
) -> Overrides:
  """The stages, see `lt_jax.methods.compound`.

  Args:
    config: the config; every stage but the second is as long as its training.
    form: form of the last stage's fusion, a key of `lt_jax.models.fusion.FORMS`.
    near_first: the last stage starts with near images; otherwise the order is random.
    oracle: learn domain features from the target's domain labels.
    repo_quirks: follow the authors' code: the sampler shuffles the order in place, and
      the last stage trains the network at a tenth of its rate. One quirk is left out:
      there the fusion's domain gate keeps its initial rate; here its rate rises with
      the others.
  """
  source, slow, steady = (
    ConfigDict({'name': 'constant', 'base': rate}) for rate in (1e-4, 1e-5, 1e-4)
  )
  rising = ConfigDict({'name': 'curriculum', 'base': 1e-4, 'end': config.epochs})
  decoder = {'name': 'decoder', 'width': 32}
  factor = _stage(
    steady,
    **target_stream(config, domain_labels=oracle),
    method={'name': 'domain_factor', 'confusion': 1.0, 'reconstruction': 10.0},
    players={'decoder': _player(decoder, steady)},
    save_outputs=('target/train/distance',),
    surgeries=(
      copy('net/.*', 'adversarial'),
      copy('class_net/(.*)', 'adversarial', source=r'net/\1'),
    ),
  )
  if oracle:
    domains = {'name': 'linear', 'num_classes': 1 + len(config.target)}
    factor['players']['domain_classifier'] = _player(domains, steady)
  last = _adversarial(config, form, rising)
  if form != 'selector':
    own = copy('domain_net/(.*)', 'domain_factor', source=r'net/\1')
    last['surgeries'] += (own,)
  if near_first:
    last['streams']['target'] |= {
      'stage': 'domain_factor',
      'order': 'distance',
      'sampler': {'name': 'curriculum', 'window': 'shift', 'in_place': repo_quirks},
    }
  if repo_quirks:
    last['optimizer'] = {**ADAM, 'learning_rate_scale': (('.*', 0.1),)}
  centroids = {'method': {'name': 'centroid_loss', 'weight': 0.1, 'form': 'released'}}
  means = (copy('.*', 'source'), ('class_means', {}))
  stages = {
    'source': _stage(source, **centroids),
    'centroids': {**centroids, 'epochs': 0.0, 'surgeries': means},
    'adversarial': _adversarial(config, 'selector', slow),
    'domain_factor': factor,
    'scheduled': last,
  }
  return {
    'model': {'head': 'cosine_squash', 'head_options': {'scale': 16.0}},
    'stages': stages,
    'stage_order': tuple(stages),
  }


def _source_only(config: ConfigDict) -> Overrides:
  """The first stage of all, the baseline for gains."""
  whole = _ocda(config)
  alone = {'source': whole['stages']['source']}
  return {**whole, 'stages': alone, 'stage_order': tuple(alone)}


def _of_pixels(
  config: ConfigDict,
  *,
  base: str = 'adapt_seg',
  memory: bool = True,
  indicator: bool = True,
  near_first: bool = True,
) -> Overrides:
  """The stages for segmentation: the source, its memory, and the target, near to far.

  A re-creation of the paper's ideas, because no code was released, with the memory of
  `lt_jax.models.pixel_memory`. Each domain has its own batch statistics, so that an
  image borrows as much in evaluation as in training.

  Args:
    config: config of the first stage; the last stage is as long.
    base: the segmentation recipe with which the last stage adapts; AdaptSegNet, as in
      the paper.
    memory: whether the last stage enriches features with the memory.
    indicator: whether the domain decides how much an image borrows; else all borrow
      equally.
    near_first: whether the last stage offers near images first; else in random order.
  """
  inner = {'head': config.model.head, 'options': config.model.head_options.to_dict()}
  options = ConfigDict({**inner, 'indicator': indicator})
  remembering = {'model': {'head': 'pixel_memory', 'head_options': options}}
  remember = {
    **remembering,
    'epochs': 0.0,
    'surgeries': (
      copy('net/trunk/.*', 'source'),
      copy('net/head/head/(.*)', 'source', source=r'net/head/\1'),
      ('pixel_memory', {}),
    ),
    'save_outputs': ('target/train/domain_distance',),
  }
  scheduled = {
    **segmentation.RECIPES[base].overrides(config),
    **(remembering if memory else {}),
    'surgeries': tuple(
      copy(f'{name}/(.*)', 'memory' if memory else 'source', source=r'net/\1')
      for name in ('net', 'net_source')
    ),
  }
  scheduled['method']['statistics'] = 'domain_specific'
  if near_first:
    scheduled['streams']['target'] |= {
      'stage': 'memory',
      'order': 'domain_distance',
      'sampler': {'name': 'curriculum', 'window': 'expand'},
    }
  stages = {'source': {}, 'memory': remember, 'scheduled': scheduled}
  return {'stages': stages, 'stage_order': tuple(stages)}


def _by_label(
  of_images: Callable[[ConfigDict], Overrides],
  of_pixels: Callable[[ConfigDict], Overrides] | None = None,
) -> Recipe:
  """Returns a recipe with different stages for labels of images and for label maps."""

  def overrides(config: ConfigDict) -> Overrides:
    if config.task != 'segmentation':
      return of_images(config)
    if of_pixels is None:
      raise UserError(
        f'recipe {config.recipe!r} needs one label per image and has no form for label '
        "maps; use 'ocda'"
      )
    return of_pixels(config)

  return Recipe(overrides, needs=('target',))


RECIPES: dict[str, Recipe] = {
  'ocda_source': _by_label(_source_only, lambda config: {}),
  'ocda': _by_label(_ocda, _of_pixels),
  'ocda_released': _by_label(
    lambda config: _ocda(config, form='released', repo_quirks=True)
  ),
  'ocda_no_memory': _by_label(
    lambda config: _ocda(config, form='domain'),
    lambda config: _of_pixels(config, memory=False),
  ),
  'ocda_no_indicator': _by_label(
    lambda config: _ocda(config, form='selector'),
    lambda config: _of_pixels(config, indicator=False),
  ),
  'ocda_random_order': _by_label(
    lambda config: _ocda(config, near_first=False),
    lambda config: _of_pixels(config, near_first=False),
  ),
  'ocda_oracle_domains': _by_label(lambda config: _ocda(config, oracle=True)),
  'ocda_entropy': Recipe(
    lambda config: _of_pixels(config, base='minent'), needs=segmentation.NEEDS
  ),
}
