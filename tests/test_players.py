"""Players: some are moved and the others stay; they are made from a description."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.errors import UserError
from lt_jax.method import Player, first_state, named_players, tick, update
from lt_jax.models.weight_net import WeightNet
from lt_jax.optim import OPTIMIZERS, make_optimizer, per_parameter
from lt_jax.players import make_players

RULES = (('net/head/.*', 0.0), ('centroids', 0.1), ('.*', 0.5))


def rate(step):
  return jnp.float32(0.1)


def params():
  return {
    'net': {'head': {'bias': jnp.ones(3)}, 'trunk': {'kernel': jnp.ones((2, 2))}},
    'centroids': jnp.ones((3, 2)),
  }


def state_of(optimizer):
  stats = {'net': {'mean': jnp.ones(2)}}
  return first_state(jnp.zeros(2), params(), stats, optimizer.init(params()))


def assert_same(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def but(player, tree):
  return {name: own for name, own in tree.items() if name != player}


@pytest.mark.parametrize('player', params())
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_one_player_moves_and_the_others_stay(name, player):
  optimizer = make_optimizer(
    name, rate, weight_decay=RULES, learning_rate_scale=RULES, decoupled=True
  )
  before = state_of(optimizer)
  grads = jax.tree.map(jnp.ones_like, {player: params()[player]})
  after, metrics = update(before, grads, optimizer)
  both, _ = update(before, jax.tree.map(jnp.ones_like, params()), optimizer)
  for field in ('params', 'opt'):
    ours, theirs = getattr(after, field), getattr(before, field)
    assert_same(but(player, ours), but(player, theirs))
    assert_same(ours[player], getattr(both, field)[player])
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, ours[player], theirs[player]))
  assert int(after.step) == 0 and int(tick(after).step) == 1
  assert_same(after.replace(params={}, opt={}), before.replace(params={}, opt={}))
  size = sum(x.size for x in jax.tree.leaves(grads))
  np.testing.assert_allclose(metrics['grad_norm'][0], np.sqrt(size), rtol=1e-6)


def test_the_state_of_a_player_has_no_name_of_it_inside():
  opt = make_optimizer('sgd', rate).init(params())
  trace = {name: own.inner_state.trace for name, own in opt.items()}
  assert jax.tree.map(jnp.shape, trace) == jax.tree.map(jnp.shape, params())


def test_rules_are_checked_against_all_players_at_once():
  """A rule for one player is no mistake where only the other one moves."""
  net = {'net': params()['net']}
  with pytest.raises(UserError, match="'centroids' matches no parameter"):
    per_parameter(RULES, net)
  values = per_parameter(RULES, net, some=True)
  assert values['net'] == {'head': {'bias': 0.0}, 'trunk': {'kernel': 0.5}}
  optimizer = make_optimizer('sgd', rate, learning_rate_scale=RULES)
  with pytest.raises(UserError, match="'centroids' matches no parameter"):
    optimizer.init(net)
  assert_same(optimizer.held(net), net)


# From a config.


def described(**changes):
  parts = {
    'network': {'name': 'weight_net', 'hidden': 7},
    'optimizer': {'name': 'sgd', 'momentum': 0.5},
    'schedule': {'name': 'cosine', 'base': 0.5, 'end': 2},
  }
  return {'critic': {k: v for k, v in {**parts, **changes}.items() if v is not None}}


def test_a_player_is_made_of_its_three_parts():
  (player,) = named_players(make_players(described(), length=20, batch=10), 'critic')
  assert player.net == WeightNet(7)
  rates = player.optimizer.learning_rate(jnp.array([0, 2, 4]))
  np.testing.assert_allclose(rates, [0.5, 0.25, 0], atol=1e-6)
  opt = player.optimizer.init({'critic': jnp.zeros(2)})
  assert opt['critic'].inner_state.trace.shape == (2,)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'network': {'name': 'weightnet'}}, "unknown network .*mean 'weight_net'"),
    ({'network': {'hidden': 7}}, 'network must be a dict with a name'),
    ({'network': {'name': 'weight_net', 'hiden': 7}}, "no option 'hiden'"),
    ({'network': None}, "needs the option 'network'"),
    ({'optimizer': {}}, 'optimizer must be a dict with a name'),
    ({'optimizer': {'name': 'sdg'}}, "did you mean 'sgd'"),
    ({'schedule': {'name': 'constant'}}, 'schedule.base is None'),
    ({'schedule': {'name': 'cosine', 'base': 0.1, 'end': 'a'}}, 'must be a number'),
    ({'schedule': 0.1}, 'schedule must be a dict with a name'),
    *[
      ({'schedule': {'name': 'constant', 'base': base}}, f'schedule.base is {base}; it')
      for base in (-1.0, np.nan, np.inf)
    ],
    ({'schedule': {'name': 'linear', 'base': 0.1}}, 'unknown schedule'),
    ({'epochs': 3}, "no option 'epochs'"),
  ],
)
def test_a_description_that_makes_no_player_is_reported(changes, message):
  with pytest.raises(UserError, match=f'players.critic: .*{message}') as error:
    make_players(described(**changes), length=20, batch=10)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    ((), "needs a player 'critic': set players.critic"),
    (('critic', 'other'), "has no player 'other'"),
    (('critics',), "did you mean 'critic'"),
  ],
)
def test_a_method_names_its_players(names, message):
  with pytest.raises(UserError, match=message):
    named_players(dict.fromkeys(names, Player(None, None)), 'critic')


def test_a_weight_network_without_units_is_reported():
  with pytest.raises(UserError, match='hidden must be positive, got 0'):
    WeightNet(0).init(jax.random.key(0), jnp.zeros(1))
