"""Faces: metrics compared with loops over all pairs, lists, and runs on miniatures."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import ms1m_lt
from lt_jax import build, evaluate, prepare, report, run, trained
from lt_jax.config import resolve
from lt_jax.data import generated, sources
from lt_jax.data.dataset import load_dataset
from lt_jax.errors import UserError
from lt_jax.evals import identification as faces
from tests import mini

ROOT = pathlib.Path(__file__).parents[1]


def units(rng, *shape):
  x = rng.normal(size=shape)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


# Metrics.


@pytest.mark.parametrize('block', [1, 40, 10**6])
@pytest.mark.parametrize('rate', [0.02, 0.3, 1.0])
def test_a_comparison_is_a_loop_over_all_pairs(rng, block, rate):
  probes = faces.Images(units(rng, 12, 3), rng.integers(0, 5, 12))
  identity = np.append(np.arange(5), rng.integers(0, 8, 11))
  gallery = faces.Images(units(rng, 16, 3), identity)
  found = faces.compare(probes, gallery, rate, block)
  genuine, impostors, right = [], [], []
  for x, i in zip(*probes, strict=True):
    cosines = {True: [], False: []}
    for y, j in zip(*gallery, strict=True):
      cosines[bool(i == j)].append(float(x @ y))
    right.append(max(cosines[True]) > max(cosines[False]))
    genuine += cosines[True]
    impostors += cosines[False]
  np.testing.assert_array_equal(faces.rank1(found), right)
  assert found.impostor_pairs == len(impostors)
  np.testing.assert_allclose(sorted(found.genuine), sorted(genuine), rtol=1e-12)
  kept = sorted(impostors, reverse=True)[: int(rate * len(impostors)) + 1]
  np.testing.assert_allclose(found.impostors[: len(kept)], kept, rtol=1e-12)
  # The lowest of all cosines above which there are few enough impostors.
  bounds = [-np.inf, *sorted(impostors)]
  t = next(t for t in bounds if np.mean(np.array(impostors) > t) <= rate)
  expected = np.mean(np.array(genuine) > t)
  assert faces.true_positive_rate(found, rate) == pytest.approx(expected)
  assert faces.true_positive_rate(found, 1e-4) is None  # for so few pairs


def images(*rows):
  """Returns images in the plane, given (angle in degrees, identity)."""
  angle, identity = np.array(rows, float).T
  x = np.stack([np.cos(np.radians(angle)), np.sin(np.radians(angle))], axis=1)
  return faces.Images(x.astype(np.float32), identity.astype(int))


def test_identification_by_hand():
  """A probe of each kind: nearest, with a nearer distractor, tied with one."""
  gallery = images((0, 0), (90, 1), (180, 7), (40, 9), (180, 9))
  probes = images((10, 0), (30, 0), (85, 1), (178, 7), (270, 1))
  found = faces.rank1(faces.compare(probes, gallery))
  # The fourth is as near to the last distractor, the fifth nearer to identity 0's.
  assert found.tolist() == [True, False, True, False, False]
  both = images((0, 0), (200, 0), (90, 1))
  assert faces.rank1(faces.compare(images((190, 0)), both)).tolist() == [True]


def test_equal_images_are_equal_whatever_float32_makes_of_them(rng):
  x = units(rng, 64).astype(np.float32)
  other = np.nextafter(x, np.float32(2))
  gallery = faces.Images(np.stack([other, x]), np.array([0, 1]))
  for identity in (0, 1):
    probe = faces.Images(x[None], np.array([identity]))
    assert not faces.rank1(faces.compare(probe, gallery)).any()


def by_trial(cosine, same):
  """Returns the best accuracy and the highest threshold that reaches it."""
  steps = np.unique(cosine)
  tried = [np.inf, *((steps[1:] + steps[:-1]) / 2)[::-1], -np.inf]
  right = [((cosine >= t) == same).mean() for t in tried]
  return max(right), tried[int(np.argmax(right))]


@pytest.mark.parametrize('kinds', [2, 5, 100])
def test_the_best_threshold_is_the_best_of_all(rng, kinds):
  for _ in range(20):
    cosine = rng.integers(0, kinds, 9) / 8
    same = rng.integers(0, 2, 9).astype(bool)
    found = faces.best_threshold(cosine, same)
    best, threshold = by_trial(cosine, same)
    assert found == threshold
    assert ((cosine >= found) == same).mean() == best


def test_a_fold_is_classified_with_the_threshold_of_the_others(rng):
  pairs = faces.Pairs(
    rng.integers(0, 6, 40) / 5, rng.integers(0, 2, 40) > 0, np.arange(40) % 4
  )
  shares = []
  for fold in range(4):
    others = pairs.fold != fold
    _, threshold = by_trial(pairs.cosine[others], pairs.same[others])
    shares.append(
      np.mean(
        [(c >= threshold) == s for c, s, f in zip(*pairs, strict=True) if f == fold]
      )
    )
  assert faces.verification_accuracy(pairs) == pytest.approx(np.mean(shares))


def test_pairs_have_one_identity_or_two(rng):
  """Images of an identity share a direction, orthogonal to other identities'."""
  people = rng.integers(0, 6, 30)
  shown = np.append(np.arange(6), rng.integers(0, 8, 20))
  probes = faces.Images(np.eye(8)[people], people)
  gallery = faces.Images(np.eye(8)[shown], shown)
  pairs = faces.draw_pairs(probes, gallery, folds=4)
  np.testing.assert_array_equal(pairs.same, np.arange(60) < 30)
  np.testing.assert_array_equal(pairs.cosine, pairs.same.astype(float))
  of_person = {(p, f) for p, f in zip([*people, *people], pairs.fold, strict=True)}
  assert len(of_person) == len(set(people)) and {f for _, f in of_person} == {*range(4)}
  assert faces.verification_accuracy(pairs) == 1
  again = faces.draw_pairs(probes, gallery, folds=4)
  np.testing.assert_array_equal(pairs.fold, again.fold)
  alone = faces.Images(probes.embedding[:3], np.zeros(3, int))
  assert faces.draw_pairs(alone, gallery) is None


def test_probes_by_the_training_images_of_their_identities():
  groups = {
    'many': np.array([True, False, False, False]),
    'medium': np.zeros(4, bool),
    'few': np.array([False, False, True, True]),
  } | faces.one_shot(np.array([50, 8, 3, 1]))
  groups['medium'][1] = True
  found = faces.shots(np.array([0, 1, 2, 3, 4, 9]), groups)
  where = {name: np.flatnonzero(mask).tolist() for name, mask in found.items()}
  assert where == {'many': [0], 'medium': [1], 'few': [2], 'one': [3], 'zero': [4, 5]}


def test_the_metrics_of_a_hand_case():
  """Half of the trained identities are identified, and all strangers."""
  gallery = images((0, 0), (90, 1), (180, 2), (20, 3))
  probes = images((3, 0), (18, 0), (91, 1), (179, 2))
  groups = {'many': np.array([True, True, True, False]), 'few': np.zeros(4, bool)}
  found = faces.identification(probes, gallery, groups)
  assert found['rank1'] == 0.75
  assert found['rank1_many'] == pytest.approx(2 / 3) and found['rank1_few'] is None
  assert 0 <= found['verification_accuracy'] <= 1
  assert found['tpr_at_fpr_1e-3'] is None and found['tpr_at_fpr_1e-6'] is None


def test_only_images_with_a_role_keep_an_embedding():
  outputs = {
    'logits': jnp.zeros((2, 3)),
    'features': jnp.asarray([[3.0, 4.0], [0, 0]]),
  }
  batch = {'label': jnp.array([0, 1])}
  assert 'embedding' not in jax.eval_shape(faces.record, outputs, batch)
  batch |= {'role': jnp.array([0, 1]), 'identity': jnp.array([0, 5])}
  found = jax.jit(faces.keep(2, 3))(outputs, batch)
  np.testing.assert_allclose(found['embedding'], [[0.6, 0.8], [0, 0]], rtol=1e-6)
  assert {'role', 'identity', 'features', 'prediction'} <= found.keys()


# Lists.


def write(folder, **lists):
  for name, lines in lists.items():
    (folder / f'{name}.txt').write_text(''.join(f'{line}\n' for line in lines))
    for line in lines:
      (folder / line.split()[0]).touch()
  return f'list:{folder}'


LISTS = {
  'train': ['a 0', 'b 1', 'c 1'],
  'test': ['d 1'],
  'gallery': ['e 0', 'f 4'],
  'probe': ['g 4', 'h 0', 'i 4'],
  'distractors': ['j -1', 'k -1'],
}


def test_lists_with_roles_make_one_set_of_test_images(tmp_path):
  source = write(tmp_path, **LISTS)
  loaded = sources.load_source(source)
  assert set(loaded) == {'train', 'test'}
  test = loaded['test']
  assert test.attributes['role'].tolist() == [-1, 0, 0, 1, 1, 1, 2, 2]
  assert test.attributes['identity'].tolist() == [1, 0, 4, 4, 0, 4, 5, 5]
  assert [test.where(i)[-1] for i in range(8)] == [*'defghijk']
  dataset = load_dataset(source, to_device=None, image_size=8, resize=8)
  known, others = dataset.tests['test'], dataset.tests['open_test']
  assert known.numbers()['identity'].tolist() == known.labels.tolist() == [1, 0, 0]
  assert others.labels.tolist() == [-1] * 5
  assert others.numbers()['role'].tolist() == [0, 1, 1, 2, 2]
  moved = {**LISTS, 'gallery': ['e 0', 'f 4', 'g 4'], 'probe': ['h 0', 'i 4']}
  (tmp_path / 'other').mkdir()
  other = sources.load_source(write(tmp_path / 'other', **moved))['test']
  assert other.paths == test.paths
  assert sources.fingerprint(other) != sources.fingerprint(test)


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'gallery': None}, r'probe.txt: gallery.txt is missing next to it'),
    ({'probe': None}, r'gallery.txt: probe.txt is missing next to it'),
    ({'probe': ['h 0', 'g 3']}, r'probe.txt:2: identity 3 has no image in .*gallery'),
    ({'open': ['o -1']}, r'open.txt: with a gallery, .*distractors.txt'),
    ({'distractors': ['j 7']}, r'distractors.txt:1: label 7: in an open list'),
    ({'gallery': ['a 0', 'f 4']}, r'a is listed twice'),
    (
      {'test': None, 'gallery': ['f 4'], 'probe': ['g 4']},
      'no image of the split test is of a known class.* test.txt',
    ),
  ],
)
def test_faults_of_lists_with_roles(tmp_path, changed, message):
  lists = {name: lines for name, lines in (LISTS | changed).items() if lines}
  with pytest.raises(UserError, match=message):
    load_dataset(write(tmp_path, **lists), to_device=None, image_size=8, resize=8)


def test_settings_that_would_lose_the_roles_are_rejected(tmp_path):
  source = write(tmp_path, **LISTS)
  with pytest.raises(UserError, match='keep_classes cannot .*has a gallery and probes'):
    load_dataset(source, to_device=None, image_size=8, resize=8, keep_classes='0')
  pytest.importorskip('tensorflow_datasets')
  with pytest.raises(UserError, match='which records cannot store'):
    prepare.convert(source, name='faces', data_dir=str(tmp_path / 'records'))


def test_a_gallery_is_generated_of_head_tail_and_strangers():
  made = generated.sources(
    classes=9,
    train=90,
    largest=10,
    smallest=10,
    test=0,
    gallery=8,
    probe=11,
    distractors=3,
  )['test']
  role, identity = made.attributes['role'], made.attributes['identity']
  assert identity[role == 0].tolist() == [0, 1, 3, 4, 6, 8, 9, 10]
  np.testing.assert_array_equal(identity[role == 1][:8], identity[role == 0])
  assert (role == 1).sum() == 11 and set(identity[role == 2]) == {17}


# Runs.


def small(arg, data, **overrides):
  config = ms1m_lt.get_config(arg)
  config.model.trunk_options.width = 4
  config.update_from_flattened_dict(
    {
      'data.image_size': 32,
      'data.resize': 32,
      'data.workers': 0,
      'batch': 8,
      'eval_batch': 64,
      'log_every_steps': 1,
      **data,
      **overrides,
    }
  )
  return resolve(config)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('faces')
  lists, root = mini.write_faces(folder, np.random.default_rng(0))
  return {'data.source': f'list:{lists}', 'data.dir': str(root)}


def check(result):
  """Checks what holds for any network that can distinguish the miniature's pictures."""
  test = result['test']
  assert test['rank1'] == 11 / 12 and test['rank1_zero'] == 3 / 4
  assert {test[f'rank1_{name}'] for name in ('many', 'medium', 'few', 'one')} == {1.0}
  assert 0.5 < test['verification_accuracy'] <= 1
  assert test['tpr_at_fpr_1e-3'] is None and 0 <= test['auroc'] <= 1
  assert {'accuracy', 'many', 'medium', 'few', 'one'} <= test.keys()


def test_a_miniature_goes_through_the_config(one_device, data, tmp_path):
  """It trains, identifies, can be evaluated again, can predict and has a page."""
  made = small('ce,net=resnet10,epochs=0.2', data)
  made['model'] |= {'trunk': 'digits_cnn', 'trunk_options': {'width': 4}}
  result = run.run(made, tmp_path)
  assert (result['step'], result['select']) == (2, 'last')
  check(result)
  again = evaluate.evaluate(epath.Path(tmp_path))
  assert again['test']['rank1'] == result['test']['rank1']
  opened = trained.open_run(
    epath.Path(tmp_path), batch=8
  )  # where no data are available
  assert len(opened.class_names) == len(mini.FACES)
  page = report.write(tmp_path).with_suffix('.md').read_text()
  assert 'rank-1, zero-shot' in page and 'TPR at FPR 1e-3' in page
  facts = json.loads((tmp_path / 'data.json').read_text())
  assert facts['counts']['train'] == list(mini.FACES)


@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['range', 'oltr'])
def test_the_second_trainings_of_the_paper(one_device, data, tmp_path, recipe):
  check(run.run(small(f'{recipe},net=resnet10,epochs=0.2', data), tmp_path))


def test_a_whole_face_is_trained_on(data):
  sides = {'data.image_size': 64, 'data.resize': 64}
  experiment = build.build(small('ce,net=resnet10', data, **sides), devices=1)
  split = experiment.dataset.splits['train']
  trained = split.example(0, np.random.default_rng(0))['image']
  np.testing.assert_array_equal(trained, split.example(0)['image'])


def test_data_without_roles_are_rejected(data, tmp_path):
  fake = {'data.source': 'fake', 'data.fake.gallery': 0, 'data.fake.test': 9}
  with pytest.raises(
    UserError, match='needs a role for every test image: put the lists'
  ):
    build.build(small('ce,net=resnet10', fake), devices=1)


@pytest.mark.slow
def test_twenty_thousand_identities_within_four_gigabytes(tmp_path):
  """Full-size images, in a separate process whose peak memory the system reports."""
  fake = {'classes': 20_000, 'train': 240_000, 'gallery': 4000, 'probe': 6000}
  options = {f'data.fake.{key}': value for key, value in fake.items()} | {
    'data.source': 'fake',
    'data.fake.distractors': 2000,
    'data.workers': 0,  # so that one process takes all the memory
    'model.trunk_options.width': 16,
    'batch': 32,
    'eval_batch': 250,
    'log_every_steps': 1,
  }
  command = [
    *(sys.executable, '-m', 'lt_jax.main', f'--workdir={tmp_path / "run"}'),
    f'--config={ROOT}/configs/ms1m_lt.py:ce,net=resnet10,epochs=0.0005',
    *(f'--config.{key}={value}' for key, value in options.items()),
  ]
  with (tmp_path / 'printed').open('w') as printed:
    child = subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=printed)
    _, status, used = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)
  assert child.returncode == 0, (tmp_path / 'printed').read_text()
  result = json.loads((tmp_path / 'run' / 'result.json').read_text())
  assert result['step'] == 4 and 0 <= result['test']['rank1_zero'] <= 1
  assert result['test']['tpr_at_fpr_1e-6'] is not None
  print(f'peak {used.ru_maxrss / 2**20:.2f} GiB, {result["wall_seconds"]} s')
  assert used.ru_maxrss < 4 * 2**20  # in kB
