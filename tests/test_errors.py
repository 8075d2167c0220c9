"""Messages: classes are named by number and name, and near misses get suggestions."""

import numpy as np
import pytest
from etils import epath

from lt_jax import build, run, stage
from lt_jax.class_weights import make_class_weights
from lt_jax.data.episodes import episodes
from lt_jax.data.samplers import SAMPLERS
from lt_jax.errors import ClassError, UserError, class_names, suggest
from lt_jax.evals.openmax import fit_tails
from lt_jax.losses import LOSSES, make_loss
from lt_jax.surgeries import posthoc
from lt_jax.surgery import _means
from tests import tiny

NAMES = ('ant', 'bee', 'cat', 'dog')
COUNTS = np.array([3, 0, 2, 1])
LABELS = np.repeat(np.arange(4), COUNTS)


@pytest.mark.parametrize(
  'make',
  [
    lambda: SAMPLERS['class_balanced'](LABELS),
    lambda: SAMPLERS['class_aware'](LABELS, batch=2),
    lambda: episodes(LABELS, COUNTS != 1, novel=1, queries_novel=1, queries_base=1),
    lambda: make_class_weights('inverse_frequency', COUNTS),
    lambda: make_loss('ldam', COUNTS),
    lambda: posthoc.adjust_logits(None, counts=COUNTS),
    lambda: fit_tails(np.array([np.inf]), np.array([1]), np.zeros((4, 4))),
    lambda: _means(np.ones((4, 2)), COUNTS, 'val'),
  ],
)
def test_a_class_is_named_wherever_its_name_is_known(make):
  with pytest.raises(ClassError, match='class 1( |$)'):
    make()
  with pytest.raises(UserError, match=r"class 1 \('bee'\) "), class_names(NAMES):
    make()


@pytest.fixture(scope='module')
def named_npz(tmp_path_factory):
  path = tiny.write_npz(tmp_path_factory.mktemp('named') / 'tiny.npz')
  np.savez(path, **np.load(path), class_names=NAMES)
  return path


def test_a_build_knows_the_names(named_npz):
  config = tiny.config(named_npz, 'ce')
  config['data'] |= {'profile': 'exponential', 'n_max': 5, 'imbalance': 20.0}
  with pytest.raises(UserError, match=r"class 2 \('cat'\) without images"):
    build.build(config)


def test_a_starting_stage_knows_the_names(named_npz, tmp_path, monkeypatch):
  def operate(*_):
    raise ClassError('', 3, ' has no image in val')

  monkeypatch.setattr(stage, 'operate', operate)
  with pytest.raises(UserError, match=r"class 3 \('dog'\) has no image in val"):
    run.run(tiny.config(named_npz, 'ce'), epath.Path(tmp_path / 'run'))


@pytest.mark.parametrize(
  ('typed', 'known', 'suggestion'),
  [
    ('ldm', LOSSES, "; did you mean 'ldam'?"),
    ('LDAM', LOSSES, "; did you mean 'ldam'?"),
    ('focal', LOSSES, "; did you mean 'softmax_focal' or 'sigmoid_focal'?"),
    ('ab', ['abc', 'abd', 'abe'], "; did you mean 'abc', 'abd' or 'abe'?"),
    ('xyz', ['abc', 'abd'], '; known: abc, abd'),
    ('xyz', [], ''),
  ],
)
def test_near_misses_are_suggested(typed, known, suggestion):
  assert suggest(typed, known) == suggestion


def test_a_long_list_of_known_names_is_cut():
  names = [f'name {number}' for number in range(100)]
  assert suggest('xyz', names[:20]) == f'; known: {", ".join(names[:20])}'
  assert suggest('xyz', names) == f'; known: {", ".join(names[:12])} and 88 more'
