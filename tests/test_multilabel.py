"""Images with several classes: losses, measures, VOC's records and a run."""

import io
import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import fine_grained
from lt_jax import build, cautions, report, run
from lt_jax.config import resolve
from lt_jax.data.arrays import rarest
from lt_jax.data.digit_tasks import TRAITS, digit_task
from lt_jax.data.sources import fingerprint, load_source, store_labels
from lt_jax.errors import UserError
from lt_jax.evals.multilabel import average_precision, measure
from lt_jax.losses import make_loss
from tests import mini

pytestmark = pytest.mark.usefixtures('one_device')


def by_definition(scores, labels):
  """Computes the average precision at recalls 0, 0.1, ..., 1, in exact fractions."""
  order = sorted(np.flatnonzero(labels >= 0), key=lambda i: -scores[i])
  positives = sum(labels[i] == 1 for i in order)
  points, right = [], 0
  for rank, i in enumerate(order, start=1):
    right += labels[i] == 1
    points.append((Fraction(int(right), int(positives)), Fraction(int(right), rank)))
  levels = [Fraction(k, 10) for k in range(11)]
  best = [max(p for recall, p in points if recall >= level) for level in levels]
  return float(sum(best) / 11)


@pytest.mark.parametrize(
  ('labels', 'expected'),
  [
    ([1, 0, 0, 0], 1.0),
    ([0, 0, 0, 1], 1 / 4),
    ([1, 1, 1, 1], 1.0),
    ([0, 1, 0, 1], 1 / 2),
    ([-1, 1, -1, 0], 1.0),  # difficult objects are ignored
    ([1, 0, 0, 1], (6 * 1 + 5 * 1 / 2) / 11),
  ],
)
def test_average_precision_by_hand(labels, expected):
  scores, labels = np.array([0.9, 0.7, 0.5, 0.3]), np.array(labels)
  assert average_precision(scores, labels) == pytest.approx(expected, abs=1e-15)
  assert by_definition(scores, labels) == pytest.approx(expected, abs=1e-15)


def test_measures_are_those_of_each_class(rng):
  scores, classes = rng.normal(size=(60, 4)), rng.integers(-1, 2, (60, 4))
  classes[:, 3] = np.where(classes[:, 3] == 1, 0, classes[:, 3])  # of no image
  first = scores.argmax(1)
  hit = classes[np.arange(60), first] == 1
  label = np.where(hit, first, 0)
  records = {'scores': scores, 'classes': classes, 'prediction': first, 'label': label}
  label[~hit] = (first[~hit] + 1) % 4
  p = 1 / (1 + np.exp(-scores))
  binary = -np.where(classes == 1, np.log(p), np.log(1 - p)) * (classes >= 0)
  records['loss'] = binary.sum(1)
  few = np.array([False, True, True, False])
  found = measure(records, num_classes=4, groups={'few': few, 'many': ~few & False})
  wanted = [by_definition(scores[:, c], classes[:, c]) for c in range(3)]
  ap = found['class_average_precision']
  np.testing.assert_allclose(ap[:3], wanted, atol=1e-15)
  assert np.isnan(ap[3]) and found['classes_counted'] == 3
  assert found['map'] == pytest.approx(np.mean(wanted))
  assert found['few'] == pytest.approx(np.mean(wanted[1:])) and found['many'] is None
  assert found['hit'] == hit.mean()
  assert found['loss'] == pytest.approx(binary.sum() / (classes >= 0).sum())


@pytest.mark.parametrize(('name', 'gamma'), [('cross_entropy', 0), ('focal', 2.0)])
def test_sigmoid_losses_take_all_classes_of_an_image(rng, name, gamma):
  """Against float64 sums; with one class per image it equals the usual loss exactly."""
  z, classes = rng.normal(size=(5, 3)), rng.integers(-1, 2, (5, 3))
  options = {'gamma': gamma} if gamma else {}
  loss = make_loss(f'sigmoid_{name}', counts=np.ones(3), **options)
  label = jnp.array([0, 1, 2, 0, 1])
  batch = {'label': label, 'classes': jnp.asarray(classes, jnp.int32)}

  def total(z):
    return loss({'logits': z}, batch)

  p = 1 / (1 + np.exp(-np.where(classes == 1, z, -z)))
  wanted = (-((1 - p) ** gamma) * np.log(p) * (classes >= 0)).sum(1)
  z = jnp.asarray(z, jnp.float32)
  np.testing.assert_allclose(total(z), wanted, rtol=1e-5)
  grads = jax.grad(lambda z: total(z).sum())(z)
  assert not np.any(np.asarray(grads)[classes < 0])
  batch['classes'] = jax.nn.one_hot(label, 3, dtype=jnp.int32)
  alone = loss({'logits': z}, {'label': label})
  np.testing.assert_array_equal(total(z), alone)


def test_the_rarest_class_is_the_label():
  classes = digit_task('traits', None)['train'].attributes['classes']
  label = rarest(classes)
  counts = classes.sum(0)
  assert (classes[np.arange(len(label)), label] == 1).all()
  for row, own in zip(classes, label, strict=True):
    assert counts[own] == counts[row == 1].min()
  assert set(label) == set(range(len(TRAITS)))
  always = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1]])  # the first is never the rarest
  assert sorted(rarest(always)) == [0, 1, 2]


# VOC's records.


def jpeg(rng):
  file = io.BytesIO()
  shape = (*rng.integers(40, 50, 2), 3)
  Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).save(file, 'JPEG')
  return file.getvalue()


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
  """Returns the folder of data sets with a miniature VOC 2007 in TFDS's format."""
  import tensorflow_datasets as tfds

  rng = np.random.default_rng(0)

  def row(number):
    cat, person = {'label': 7}, {'label': 14}
    objects = [cat, {**person, 'is_difficult': True}]
    if number >= 12:  # every class has an image
      objects = [{'label': number - 12}]
    elif number % 2:
      objects.append(person)  # so person is known here
    if number % 3 == 0 and number < 12:
      objects.append({'label': 2, 'is_difficult': True})
    objects = [
      {
        'bbox': tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
        'is_difficult': False,
        'is_truncated': False,
        'pose': 0,
        **one,
      }
      for one in objects
    ]
    plain = [one['label'] for one in objects if not one['is_difficult']]
    return {
      'image': jpeg(rng),
      'image/filename': f'{number:06d}.jpg',
      'labels': sorted({one['label'] for one in objects}),
      'labels_no_difficult': sorted(set(plain)),
      'objects': objects,
    }

  splits = {'train': 32, 'validation': 6, 'test': 8}
  rows = {split: [row(i) for i in range(count)] for split, count in splits.items()}
  folder = tmp_path_factory.mktemp('voc')
  return mini.write_records(folder, 'voc/2007', rows)


def test_classes_of_difficult_objects_alone_are_not_known(voc):
  source = load_source('tfds:voc/2007', str(voc))['train']
  classes = source.attributes['classes']
  assert classes.shape == (32, 20) and source.class_names[14] == 'person'
  for number, row in enumerate(classes[:12]):
    expected = {7: 1, 14: 1 if number % 2 else -1}
    expected |= {2: -1} if number % 3 == 0 else {}
    assert {c: row[c] for c in np.flatnonzero(row)} == expected
  wanted = [14 if i % 2 else 7 for i in range(12)]
  np.testing.assert_array_equal(source.labels[:12], wanted)
  before = fingerprint(source)
  store_labels({'train': source})
  again = load_source('tfds:voc/2007', str(voc))['train']
  np.testing.assert_array_equal(again.attributes['classes'], classes)
  assert fingerprint(again) == before
  again.attributes['classes'][0, 3] = 1
  assert fingerprint(again) != before


def test_the_config_of_voc_reads_its_records(voc):
  config = fine_grained.get_config('frozen,target=voc2007,net=resnet10,size=32')
  config.data.dir, config.data.workers = str(voc), 0
  config.batch, config.init = 4, ''
  experiment = build.build(resolve(config), devices=1)
  stage, data = experiment.last, experiment.dataset
  assert stage.task.headline == 'map' and {*data.splits} == {'train', 'val'}
  assert (data.counts[[7, 14, 2]] == (13, 7, 1)).all()
  batch = stage.streams['train'].payload(0)
  assert batch['classes'].shape == (4, 20)
  config.task = 'classification'
  (line,) = cautions._several_classes(build.build(resolve(config), devices=1))
  assert "set task to 'multilabel'" in line


# A run.


def small(recipe, **options):
  arg = f'{recipe},target=voc2007,data=digits_tasks:traits,net=digits_cnn,size=0'
  config = fine_grained.get_config(f'{arg},epochs=2')
  config.model.trunk_options = {'width': 2}
  config.data.update(mean=(0.3,), std=(0.4,), flip=False, resize=0, workers=0)
  config.update_from_flattened_dict(options)
  return resolve(config)


def test_a_run_of_several_classes(tmp_path):
  """A long-tail loss, weights by the rarest class, and a long-tailed subset."""
  profile = {'data.profile': 'exponential', 'data.n_max': 100, 'data.imbalance': 4.0}
  run.run(small('cb_focal', **profile), tmp_path)
  result = json.loads((tmp_path / 'result.json').read_text())
  test = result['test']
  ap = test['class_average_precision']
  assert test['map'] == pytest.approx(np.mean(ap)) and len(ap) == len(TRAITS)
  with np.load(tmp_path / 'predictions.npz') as stored:
    classes, logits = stored['classes'], stored['logits']
  wanted = [by_definition(logits[:, c], classes[:, c]) for c in range(len(ap))]
  np.testing.assert_allclose(ap, wanted, atol=0.02)  # of logits in float16
  report.write(tmp_path)
  page = (tmp_path / 'report.md').read_text()
  shown = ' | '.join(f'{100 * value:.1f}' for value in ap)
  assert 'average precision by class' in page and shown in ' '.join(page.split())


def test_impossible_runs_are_reported(tmp_path):
  splits, labels = ('train', 'test'), np.arange(6) % 2
  parts = {f'x_{split}': np.zeros((6, 4, 4), np.uint8) for split in splits}
  parts |= {f'y_{split}': labels for split in splits}
  config = small('ce')
  for classes, message in (
    (np.zeros((6, 3), int), 'the shape .6, 3., but there are 6 images and 2 classes'),
    (np.full((6, 2), 2), 'must be 1, 0, or -1'),
    (None, "task 'multilabel' needs a classes for every test image"),
  ):
    own = {} if classes is None else {f'y_{s}.classes': classes for s in splits}
    np.savez(tmp_path / 'a.npz', **parts, **own)
    config['data']['source'] = f'npz:{tmp_path}/a.npz'
    with pytest.raises(UserError, match=message):
      build.build(config, devices=1)
