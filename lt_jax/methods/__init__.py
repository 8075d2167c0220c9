"""The methods, by name. To add one, write its file here and add it to this dict."""

from lt_jax.methods import few_shot, memory, meta
from lt_jax.methods.adda import adda
from lt_jax.methods.advent import advent
from lt_jax.methods.adversarial import cdan, dann
from lt_jax.methods.aligned import aligned
from lt_jax.methods.compound import compound, domain_factor
from lt_jax.methods.generation import feature_generator
from lt_jax.methods.mcd import mcd
from lt_jax.methods.mean_teacher import mean_teacher
from lt_jax.methods.multitask import multitask
from lt_jax.methods.self_supervised import self_supervised
from lt_jax.methods.self_training import label_prior, pseudo_label, saved_label
from lt_jax.methods.supervised import supervised
from lt_jax.methods.translation import i2i

METHODS = {
  'supervised': supervised,
  'meta_weight_net': meta.meta_weight_net,
  'meta_reweight': meta.meta_reweight,
  'oltr': memory.oltr,
  'centroid_loss': memory.centroid_loss,
  'weight_generator': few_shot.weight_generator,
  'aligned': aligned,
  'dann': dann,
  'cdan': cdan,
  'mcd': mcd,
  'adda': adda,
  'compound': compound,
  'domain_factor': domain_factor,
  'self_supervised': self_supervised,
  'pseudo_label': pseudo_label,
  'saved_label': saved_label,
  'label_prior': label_prior,
  'i2i': i2i,
  'multitask': multitask,
  'advent': advent,
  'mean_teacher': mean_teacher,
  'feature_generator': feature_generator,
}
