"""Sources with other classes meet as the union of their label spaces."""

import numpy as np
import pytest

from lt_jax import build, cautions, run, train, trained
from lt_jax.config import apply, base_config, open_stages, resolve
from lt_jax.errors import UserError
from lt_jax.recipes import apply_recipe

CLASSES = {'zoo': ('cat', 'dog', 'owl'), 'farm': ('cow', 'hund', 'cat'), 'home': None}
CLASSES['home'] = ('dog', 'zoo/cat')
TRAINED = {'zoo': (5, 4, 3), 'farm': (6, 2, 4), 'home': (3, 3)}
UNION = ('zoo/cat', 'dog', 'zoo/owl', 'farm/cow', 'farm/cat')
PLACES = {'zoo': (0, 1, 2), 'farm': (3, 1, 4), 'home': (1, 0)}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """An archive a domain, whose images tell their class."""
  path, rng = tmp_path_factory.mktemp('unions'), np.random.default_rng(0)
  for name, counts in TRAINED.items():
    y = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    x = rng.integers(0, 20, (len(y), 4, 4, 1), np.uint8)
    x += np.uint8(40) * np.array(PLACES[name], np.uint8)[y][:, None, None, None]
    names = np.array(CLASSES[name])
    np.savez(
      path / f'{name}.npz', x_train=x, y_train=y, x_test=x, y_test=y, class_names=names
    )
  return path


def config(folder, **domains):
  made = base_config()
  overrides = {
    'name': 'union',
    'domains': {name: {'source': f'npz:{folder}/{name}.npz'} for name in CLASSES},
    'sources': ('zoo', 'farm'),
    'target': ('home',),
    'batch': 8,
    'eval_batch': 8,
    'epochs': 1.0,
    'model': {'trunk': 'tiny_cnn', 'trunk_options': {'width': 4}},
  }
  overrides['domains']['zoo']['same_classes'] = (('dog', 'dog'),)
  overrides['domains']['farm']['same_classes'] = (('hund', 'dog'),)
  for name, own in domains.items():
    overrides['domains'][name] |= own
  apply(made, overrides)
  return resolve(open_stages(apply_recipe(made, 'source_only')))


def test_labels_names_and_counts_are_those_of_the_union(folder):
  experiment = build.build(config(folder), devices=1)
  stage = experiment.last
  assert stage.dataset.class_names == UNION
  assert stage.dataset.counts.tolist() == [5, 4 + 2, 3, 6, 4]
  assert experiment.domains['home'].class_names == UNION
  assert experiment.domains['home'].counts.tolist() == [3, 3, 0, 0, 0]
  # Each image says of which class of the union it is; the domains follow each other.
  stream = stage.streams['train']
  seen = set()
  for step in range(3):
    payload = stream.payload(step)
    images = np.asarray(stream.arrays['image'])[payload['index']]
    np.testing.assert_array_equal(images.max((1, 2, 3)) // 40, payload['label'])
    seen |= set(zip(payload['domain'].tolist(), payload['label'].tolist(), strict=True))
  assert seen == {(0, 0), (0, 1), (0, 2), (1, 3), (1, 1), (1, 4)}
  test = stage.images['test']
  np.testing.assert_array_equal(
    test.source.images[test.rows].max((1, 2, 3)) // 40, test.labels
  )


def test_the_network_predicts_the_classes_of_the_union(folder, tmp_path):
  made = config(folder)
  facts = run._data_facts(build.build(made, devices=1), tmp_path)
  assert facts['class_names'] == list(UNION)
  stage = trained.build_without_data(made, facts).last
  head = train.state_shapes(stage.method, stage.streams).params['net']['head']
  assert stage.dataset.class_names == UNION
  assert head['kernel'].shape[-1] == len(UNION)


def test_a_map_changes_the_fingerprint_and_equal_names_are_reported(folder):
  one = build.build(config(folder), devices=1)
  (warning,) = (line for line in cautions.cautions(one) if 'same_classes' in line)
  assert "zoo and farm each have a class 'cat'" in warning
  other = build.build(
    config(
      folder,
      zoo={'same_classes': (('cat', 'zoo/cat'), ('dog', 'dog'))},
      farm={'same_classes': (('cat', 'zoo/cat'), ('hund', 'dog'))},
    ),
    devices=1,
  )
  assert other.dataset.class_names == UNION[:4]
  assert one.fingerprint != other.fingerprint
  assert not [line for line in cautions.cautions(other) if 'same_classes' in line]
  again = build.build(config(folder), devices=1, datasets=one.domains)
  assert again.fingerprint == one.fingerprint
  assert again.dataset.counts.tolist() == one.dataset.counts.tolist()


@pytest.mark.parametrize(
  ('domains', 'message'),
  [
    (
      {'zoo': {'same_classes': ()}},
      "domain 'home': its class 'dog' is none of",
    ),
    (
      {'farm': {'same_classes': (('hound', 'dog'),)}},
      "unknown class of domain 'farm' 'hound'; did you mean 'hund'",
    ),
    ({'farm': {'same_classes': (('hund',),)}}, "'farm': data.same_classes has"),
    ({'farm': {'size': 8}}, "'farm' 8x8x1: set data.size"),
  ],
)
def test_mistakes_are_one_line(folder, domains, message):
  if 'zoo' in domains:
    domains = domains | {'farm': {'same_classes': ()}}
  with pytest.raises(UserError) as error:
    build.build(config(folder, **domains))
  assert message in str(error.value)
  assert '\n' not in str(error.value)
