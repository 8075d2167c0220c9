"""Label shift: shares of classes that are found again, and what is done with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_domains, mnist_mnistm
from lt_jax import build, train
from lt_jax.config import resolve
from lt_jax.data.longtail import class_counts
from lt_jax.errors import UserError
from lt_jax.evals.label_shift import bbse, confusion, em
from lt_jax.method import Method, State
from lt_jax.surgeries.shift import ESTIMATORS, label_shift

SOURCE = np.array([0.5, 0.3, 0.2])
TARGET = np.array([0.1, 0.3, 0.6])


def posterior(x, shares):
  """P(y | x) of Gaussian classes with means 0, 2, 4."""
  joint = shares * np.exp(-((x[:, None] - [0.0, 2.0, 4.0]) ** 2) / 2)
  return joint / joint.sum(1, keepdims=True)


def draw(shares, size, rng):
  labels = rng.choice(3, size, p=shares)
  return rng.normal(2.0 * labels), labels


def test_bbse_finds_the_shares_that_explain_the_predictions():
  """Exactly, where the target's predictions are those of its shares."""
  confused = np.array([[0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.1, 0.2, 0.7]])
  np.testing.assert_allclose(bbse(confused, confused @ TARGET), TARGET, atol=1e-12)
  # As the paper has it: the joint distribution, and weights instead of shares.
  weights = np.linalg.solve(confused * SOURCE, confused @ TARGET)
  np.testing.assert_allclose(weights * SOURCE, TARGET, atol=1e-12)


def test_bbse_does_not_depend_on_the_shares_of_the_held_out_images(rng):
  x, labels = draw(np.full(3, 1 / 3), 6000, rng)
  given, _ = draw(TARGET, 6000, rng)
  probabilities = posterior(x, SOURCE)
  confused = confusion(probabilities, labels)
  np.testing.assert_allclose(confused.sum(0), 1, rtol=1e-12)
  for c in range(3):
    wanted = probabilities[labels == c].mean(0)
    np.testing.assert_allclose(confused[:, c], wanted, rtol=1e-12)
  found = bbse(confused, posterior(given, SOURCE).mean(0))
  np.testing.assert_allclose(found, TARGET, atol=0.03)
  keep = np.flatnonzero((labels > 0) | (np.arange(6000) % 5 == 0))
  fewer = bbse(
    confusion(probabilities[keep], labels[keep]), posterior(given, SOURCE).mean(0)
  )
  np.testing.assert_allclose(fewer, TARGET, atol=0.03)


def test_shares_below_zero_are_set_to_zero():
  confused = np.array([[0.8, 0.2], [0.2, 0.8]])
  np.testing.assert_array_equal(bbse(confused, np.array([0.1, 0.9])), [0, 1])


def test_what_cannot_be_estimated_is_rejected():
  with pytest.raises(UserError, match='bbse has no answer'):
    bbse(np.full((3, 3), 1 / 3), SOURCE)
  with pytest.raises(UserError, match='class 2 has no image'):
    confusion(np.eye(3)[:2], np.array([0, 1]))
  with pytest.raises(UserError, match='no image of class 1'):
    em(np.eye(3), np.array([0.5, 0.0, 0.5]))


def test_em_finds_the_most_likely_shares(rng):
  x, _ = draw(TARGET, 4000, rng)
  found = em(posterior(x, SOURCE), SOURCE)
  np.testing.assert_allclose(found, TARGET, atol=0.03)
  density = posterior(x, np.ones(3)) * np.exp(
    -((x[:, None] - [0.0, 2.0, 4.0]) ** 2) / 2
  ).sum(1, keepdims=True)

  def likelihood(shares):
    return np.log(density @ shares).sum()

  for other in (TARGET, SOURCE, *rng.dirichlet(200 * found, 50)):
    assert likelihood(found) >= likelihood(other) - 1e-6
  # A fixed point: the mean of the posteriors under the shares is the shares.
  np.testing.assert_allclose(posterior(x, found).mean(0), found, atol=1e-8)
  np.testing.assert_allclose(
    em(posterior(x, SOURCE), SOURCE, most=1), (posterior(x, SOURCE).mean(0)), rtol=1e-12
  )


def test_images_weigh_as_their_classes_are_shared():
  seen = {}

  def init(key, batches):
    return State(jnp.int32(0), key, {}, {}, {}, {})

  def step(state, batches):
    seen.update(batches['train'])
    return state, {'mean_weight': (jnp.float32(1), jnp.float32(1))}

  method = label_shift(Method(init, step, None), counts=[50, 30, 20])
  state = method.init(jax.random.key(0), {})
  batches = {'train': {'label': np.array([0, 1, 2, 2, -1])}}
  method.step(state, batches)
  np.testing.assert_allclose(seen['weight'], [1, 1, 1, 1, 0], rtol=1e-6)
  memory = {'label_shift': {'shares': jnp.asarray(TARGET, jnp.float32)}}
  method.step(state.replace(memory=memory), batches)
  np.testing.assert_allclose(seen['weight'], [0.2, 1, 3, 3, 0], rtol=1e-6)
  deaf = label_shift(Method(init, lambda s, b: (s, {}), None), counts=[50, 30, 20])
  with pytest.raises(UserError, match='does not weight images'):
    deaf.step(state, batches)


def test_a_target_has_a_tail_of_its_own():
  arg = 'dann,imbalance=10,target_imbalance=5,target_profile=reversed'
  domains = build.build(resolve(digits_domains.get_config(arg)), devices=1).domains
  own, target = (class_counts('exponential', 10, 50, by).tolist() for by in (10, 5))
  assert domains['source'].counts.tolist() == own
  assert domains['blended'].counts.tolist() == target[::-1]
  assert len(domains['blended'].tests['test'].rows) == 299  # which is not cut
  assert domains['sketched'].counts.sum() == 600
  forward = digits_domains.get_config('dann,target_imbalance=5').domains.blended
  assert class_counts(forward.profile, 10, forward.n_max, 5).tolist() == target


def test_the_budget_of_steps_is_that_of_the_tail():
  for arg in ('dann', 'dann,imbalance=100', 'dann,target_imbalance=100'):
    made = resolve(mnist_mnistm.get_config(arg))
    data = made['data']
    images = 60000
    if data['profile'] != 'original':
      images = class_counts('exponential', 10, data['n_max'], data['imbalance']).sum()
    assert int(np.ceil(made['epochs'] * images / 64)) == 5000


def test_the_surgery_estimates_with_the_network_of_an_earlier_stage():
  made = digits_domains.get_config('dann_em,target_imbalance=5,epochs=4')
  experiment = build.build(resolve(made), devices=1)
  earlier, stage = experiment.stages['source'], experiment.last
  shapes = {'source': train.state_shapes(earlier.method, earlier.streams)}
  fresh = train.state_shapes(stage.method, stage.streams)
  (estimate,) = stage.surgeries
  rehearsed = estimate(fresh, shapes).memory['label_shift']['shares']
  assert rehearsed.shape == (10,)

  first, fresh = (
    train.initial_state(one.method, one.streams, jax.random.key(seed), experiment.mesh)
    for seed, one in enumerate((earlier, stage))
  )
  found = estimate(fresh, {'source': first}).memory['label_shift']['shares']
  split = experiment.domains['blended'].splits['train']
  images = (split.source.images[split.rows] / 255 - 0.306) / 0.318
  logits = earlier.method.predict(first, jnp.asarray(images, jnp.float32))['logits']
  shares = experiment.dataset.counts / experiment.dataset.counts.sum()
  wanted = em(jax.nn.softmax(logits), shares)
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  assert np.abs(wanted - shares).max() > 0.01
  with pytest.raises(UserError, match="no wrapper 'label_shift'"):
    estimate(fresh.replace(memory={}), {'source': first})


def test_bbse_of_a_stage_takes_hard_predictions_and_validation_images(rng):
  x, labels = draw(SOURCE, 3000, rng)
  given, _ = draw(TARGET, 3000, rng)
  val = {'probability': posterior(x, SOURCE), 'label': labels}
  found = ESTIMATORS['bbse'].shares(posterior(given, SOURCE), SOURCE, val)
  hard = np.eye(3)[val['probability'].argmax(1)]
  predicted = np.bincount(posterior(given, SOURCE).argmax(1), minlength=3) / 3000
  np.testing.assert_allclose(found, bbse(confusion(hard, labels), predicted))
  np.testing.assert_allclose(found, TARGET, atol=0.05)
  assert ESTIMATORS['bbse'].reads == ('val',) and not ESTIMATORS['em'].reads
