"""Surgery: what is named is taken, what is not stays fresh, and mistakes are told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.errors import UserError
from lt_jax.method import State
from lt_jax.surgery import carry, copy, operate


def make_state(value, step=0, classes=3):
  net = {
    'trunk': {'kernel': jnp.full((2, 2), value)},
    'head': {'kernel': jnp.full((2, classes), value)},
  }
  return State(
    step=jnp.int32(step),
    key=jax.random.key(0),
    params={'net': net},
    stats={'net': {'trunk': {'mean': jnp.full(2, value)}}},
    opt={'net': {'momentum': jnp.full(2, value)}},
    memory={},
  )


def test_copy_takes_what_matches_whole_and_nothing_else():
  taken = operate(
    make_state(0.0),
    {'train': make_state(1.0, step=7)},
    [copy(pattern='net/trunk/.*', stage='train')],
  )
  assert taken.params['net']['trunk']['kernel'][0, 0] == 1
  assert taken.stats['net']['trunk']['mean'][0] == 1
  assert taken.params['net']['head']['kernel'][0, 0] == 0
  assert taken.opt['net']['momentum'][0] == 0
  assert int(taken.step) == 0


def test_carry_takes_clock_and_optimiser():
  taken = operate(
    make_state(0.0),
    {'train': make_state(1.0, step=7)},
    [carry(fields=('opt', 'step'), stage='train')],
  )
  assert taken.opt['net']['momentum'][0] == 1
  assert int(taken.step) == 7
  assert taken.params['net']['trunk']['kernel'][0, 0] == 0


def test_surgeries_are_done_in_order():
  earlier = {'a': make_state(1.0), 'b': make_state(2.0)}
  copies = [copy(pattern='.*', stage=stage) for stage in ('a', 'b')]
  taken = operate(make_state(0.0), earlier, copies)
  assert taken.params['net']['trunk']['kernel'][0, 0] == 2


def test_no_buffer_is_shared_with_an_earlier_stage():
  """A step that consumes the buffers of one must leave the other alone."""
  origin = make_state(1.0)
  taken = operate(make_state(0.0), {'a': origin}, [copy(pattern='.*', stage='a')])
  ours = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(taken.params)}
  theirs = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(origin.params)}
  assert not ours & theirs
  leaves = jax.tree.leaves(taken.params)
  assert len(ours) == len(leaves)
  jax.jit(lambda x: jax.tree.map(jnp.negative, x), donate_argnums=0)(taken.params)
  np.testing.assert_array_equal(origin.params['net']['trunk']['kernel'], 1)


@pytest.mark.parametrize(
  ('surgery', 'told'),
  [
    (copy(pattern='net/trunc/.*', stage='train'), 'matches no parameter'),
    (copy(pattern='.*', stage='trian'), "did you mean 'train'"),
    (copy(pattern='net/head/.*', stage='other'), r'net/head/kernel is \(2, 3\) here'),
    (carry(fields=('opt',), stage='unlike'), "'net/second' of stage 'unlike'"),
  ],
)
def test_mistakes_are_told(surgery, told):
  earlier = {
    'train': make_state(1.0),
    'other': make_state(1.0, classes=5),
    'unlike': make_state(1.0).replace(
      opt={'net': {'momentum': jnp.zeros(2), 'second': jnp.zeros(2)}}
    ),
  }
  with pytest.raises(UserError, match=told):
    operate(make_state(0.0), earlier, [surgery])


def test_a_field_that_cannot_be_carried_is_told():
  with pytest.raises(UserError, match="did you mean 'opt'"):
    carry(fields=('optt',), stage='train')
