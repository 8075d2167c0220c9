"""The methods, by name. A method is one file here and its line in this dict."""

from lt_jax.methods import few_shot, memory, meta
from lt_jax.methods.adversarial import dann
from lt_jax.methods.aligned import aligned
from lt_jax.methods.supervised import supervised

METHODS = {
  'supervised': supervised,
  'meta_weight_net': meta.meta_weight_net,
  'meta_reweight': meta.meta_reweight,
  'oltr': memory.oltr,
  'weight_generator': few_shot.weight_generator,
  'aligned': aligned,
  'dann': dann,
}
