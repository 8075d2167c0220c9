"""Fine-tuning recipes: which initial weights are kept, and how fast each one learns.

Each starts from the weights of `config.init` or of an earlier stage, and keeps the
config's loss, sampler and class weights. Full fine-tuning at a single rate is the
recipe `ce`.
"""

from ml_collections import ConfigDict

from lt_jax.config import Overrides
from lt_jax.recipes.parts import Recipe, copy, selected

ALL_BUT_TRUNK = r'(?!net/trunk/).*'

FROZEN = ((ALL_BUT_TRUNK, 1.0), ('.*', 0.0))


def _rates(config: ConfigDict, **options) -> Overrides:
  """The config's optimiser with different rules."""
  return {**config.optimizer.to_dict(), **options}


def _frozen(config: ConfigDict) -> Overrides:
  """The head alone; the trunk runs as in evaluation, with frozen batch statistics."""
  return {
    'optimizer': _rates(config, learning_rate_scale=FROZEN),
    'model': {'batch_norm': 'frozen'},
  }


def _head_then_all(config: ConfigDict) -> Overrides:
  """The head for a fifth of the epochs, then everything at a tenth of the rate.

  This way a random head does not spoil the features in its first steps. The lengths are
  ours: in the paper each part is a full training.

  Source: Kumar et al., ICLR 2022, arXiv 2202.10054 (LP-FT).
  """
  epochs, base = config.get_ref('epochs'), config.schedule.get_ref('base')
  head = {
    **_frozen(config),
    'epochs': epochs * 0.2,
    'schedule': {'name': 'constant', 'base': base},
  }
  every = {
    'epochs': epochs * 0.8,
    'schedule': {'name': 'cosine', 'base': base * 0.1, 'end': epochs * 0.8},
    'surgeries': (copy('net/.*', 'head'),),
  }
  return {
    **selected(config),
    'stages': {'head': head, 'all': every},
    'stage_order': ('head', 'all'),
  }


def _discriminative(config: ConfigDict) -> Overrides:
  """The trunk learns at a tenth of the rate; each part's rate is one rule."""
  rules = ((ALL_BUT_TRUNK, 1.0), ('.*', 0.1))
  return {'optimizer': _rates(config, learning_rate_scale=rules)}


def _layer_decay(config: ConfigDict) -> Overrides:
  """Rates that fall by a quarter per stage of the trunk, towards the input."""
  return {'optimizer': _rates(config, layer_decay=0.75)}


def _chop(config: ConfigDict) -> Overrides:
  """The first layers are copied, the others reinitialised; all learn at one rate."""
  optimizer = _rates(config, learning_rate_scale=(('.*', 1.0),))
  return {'kept_layers': 'first:1', 'optimizer': optimizer}


def _l2_sp(config: ConfigDict) -> Overrides:
  """The trunk decays towards its initial weights, everything else towards zero.

  Both by 0.01, as in TLLib; the paper chooses the former by validation.

  Source: Li et al., ICML 2018, arXiv 1802.01483.
  """
  return {
    'optimizer': _rates(config, weight_decay=(('.*', 0.01),), anchored='net/trunk/.*')
  }


RECIPES: dict[str, Recipe] = {
  'frozen': Recipe(_frozen, needs=('init',)),
  'head_then_all': Recipe(_head_then_all, needs=('init',)),
  'discriminative': Recipe(_discriminative, needs=('init',)),
  'layer_decay': Recipe(_layer_decay, needs=('init',)),
  'chop': Recipe(_chop, needs=('init',)),
  'l2_sp': Recipe(_l2_sp, needs=('init',)),
}
