"""Warnings before a run starts, and runs that are too large for the machine."""

import re

import numpy as np
import pytest

from lt_jax import build, doctor, footprint, results, run
from lt_jax.cautions import cautions, check_memory
from lt_jax.errors import UserError
from lt_jax.screen import Screen
from tests import tiny


def built(folder, recipe='ce', counts=tiny.COUNTS, data=None, norm='', **overrides):
  """Returns the experiment of a tiny config; nothing is compiled."""
  config = tiny.config(tiny.write_npz(folder / 'tiny.npz', counts), recipe, **overrides)
  config['data'] |= data or {}
  config['model']['batch_norm'] = norm or config['model']['batch_norm']
  return build.build(config, devices=1)


@pytest.mark.parametrize('recipe', ['ce', 'openmax', 'meta_ce'])
def test_an_ordinary_run_warns_of_nothing(tmp_path, recipe):
  assert not cautions(built(tmp_path, recipe))


@pytest.mark.parametrize(
  ('made', 'message'),
  [
    ({'epochs': 0.0}, "untrained network: stage 'train' takes no steps"),
    ({'data': {'known_classes': 3}}, 'set data.val_per_class'),
    ({'batch': 1}, "by its own statistics (batch of train 1, batch_norm 'global')"),
    (
      {'method': {'name': 'supervised', 'accumulate': 8}},
      '(batch of train 8, batch_norm',
    ),
    ({'norm': '1'}, "batch_norm '1')"),
    ({'counts': (6,), 'data': {'many_shot': 9, 'few_shot': 2}}, 'only one class'),
  ],
)
def test_each_reason_to_doubt_numbers_is_one_line(tmp_path, made, message):
  experiment = built(tmp_path, **made)
  (line,) = cautions(experiment)
  assert message in line


def test_a_short_later_stage_is_reported_in_the_banner(tmp_path, capsys):
  experiment = built(tmp_path, 'crt', epochs=1.0)
  run._banner(experiment, tmp_path, Screen(), ())
  (line,) = re.findall('(?m)^warning: .*', capsys.readouterr().out)
  assert "stage 'classifier' trains for only 1 step, too few" in line


def test_frozen_statistics_may_be_of_one_image(tmp_path):
  assert not cautions(built(tmp_path, batch=1, norm='frozen'))


@pytest.mark.parametrize(
  ('key', 'what'),
  [('batch', 'a step of'), ('eval_batch', 'an evaluation of')],
)
def test_a_batch_beyond_the_memory_is_rejected_by_its_shape(tmp_path, key, what):
  experiment = built(tmp_path, **{key: 10**9})
  with pytest.raises(UserError, match=f'{what}.* needs at least .* GB, most of it for'):
    check_memory(experiment)


def test_the_doctor_tells_of_both(tmp_path):
  def found(**overrides):
    config = tiny.config(tiny.write_npz(tmp_path / 'tiny.npz'), 'ce', **overrides)
    sections = {'': (doctor.Case.open, doctor.compiles)}
    return [finding for _, finding in doctor.examine(doctor.Case(config), sections)]

  (refused, skipped) = found(batch=10**9)
  assert refused.level == 'wrong' and 'reduce batch' in refused.text
  assert skipped.level == 'skip'
  levels = [finding.level for finding in found(epochs=0.0)]
  assert levels == ['ok', 'odd', 'ok']


def test_memory_quadratic_in_the_classes_is_named(tmp_path, monkeypatch):
  """OpenMax keeps the mean logits of each class; only the shape is needed here."""
  monkeypatch.setattr(footprint, 'machine_memory', lambda device: 25e9)
  config = tiny.config('', 'openmax')
  fake = {'classes': 100_000, 'train': 130_000, 'largest': 50, 'smallest': 1}
  config['data'] |= {
    'source': 'fake',
    'fake': {**fake, 'test': 10, 'image_size': 8},
    'meta_per_class': 0,
  }
  experiment = build.build(config, devices=1)
  with pytest.raises(
    UserError, match=r'40\.\d+ GB, most of it for memory/openmax/mean'
  ):
    check_memory(experiment)


@pytest.mark.parametrize('own', [False, True])
def test_no_number_depends_on_a_threshold_that_cannot_be_chosen(tmp_path, own):
  experiment = built(tmp_path, counts=(9, 9, 9, 9), data={'known_classes': 3})
  stage = experiment.stages['train']

  def predict(state, images):
    logits = images.reshape(len(images), -1)[:, :3]
    score = {'known_score': 7 * logits.max(axis=-1)} if own else {}
    return {'logits': logits, 'features': logits, **score}

  stage = stage._replace(method=stage.method._replace(predict=predict))
  evaluated = results.evaluate(experiment, stage, np.int32(0))
  assert evaluated.threshold['value'] is None
  for place in ('test', 'test_by_energy'):
    found = evaluated.metrics[place]
    assert 0 <= found['auroc'] <= 1
    chosen = {'f_measure_oltr2020', 'open_accuracy', 'known_accuracy', 'threshold'}
    assert not chosen & found.keys()
    published = place == 'test' and not own
    assert ('f_measure_oltr2019_at_0.1' in found) == published
