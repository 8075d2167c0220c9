"""From the final States of earlier stages to the first State of this one.

A surgery is a function (fresh, earlier) -> state, where `earlier` is a dict of States
by stage. Nothing is carried over silently: what no surgery names stays fresh.

All surgeries are rehearsed on shapes before anything is trained. During the rehearsal,
a surgery that measures something on data (through a `Survey`) only checks the shape of
its result, see `put`.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lt_jax.errors import ClassError, UserError, suggest
from lt_jax.evals.collect import Survey
from lt_jax.method import Batch, Network, State, init_net, named_key
from lt_jax.models.heads import centred_unit
from lt_jax.models.layers import Layer, chopped
from lt_jax.optim import anchored_here
from lt_jax.pretrained.inherited import inherit
from lt_jax.pretrained.ours import origin
from lt_jax.pretrained.published import pretrained

PyTree = Any
Surgery = Callable[[State, Mapping[str, State]], State]


def copy(*, pattern: str, stage: str, source: str = r'\g<0>') -> Surgery:
  r"""Takes parameters and batch statistics from an earlier stage.

  Args:
    pattern: a regular expression for whole paths: 'net/trunk/.*'. It applies to both
      parameters and statistics, and must match something.
    stage: the stage they come from.
    source: their paths there, as the replacement for a match: with the pattern
      'net/head/hallucinator/(.*)' the source r'net/head/\1' is the head of that stage.
      By default the same path.

  Raises:
    UserError: nothing matches, or a matching leaf is missing there or has another
      shape.
  """

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    origin = earlier_stage(earlier, stage)
    take = functools.partial(_replace, pattern=pattern, stage=stage, source=source)
    params, found = take(fresh.params, origin.params)
    stats, found_stats = take(fresh.stats, origin.stats)
    if not found + found_stats:
      raise UserError(f'copy: {pattern!r} matches no parameter of stage {stage!r}')
    return fresh.replace(params=params, stats=stats)

  return surgery


def start_from(
  state: State, *, source: str, class_names: Sequence[str]
) -> tuple[State, dict[str, Any]]:
  """Takes the trunk of a network from published weights, or from a run of ours.

  Args:
    state: the State of the network, or its shapes, in which case the weights are only
      checked.
    source: a `.safetensors` file, a model such as 'timm/resnet50.tv_in1k', or the
      folder of a run, whose head is also taken if it has the same classes.
    class_names: names of the network's classes.

  Returns:
    (state, what was taken, see `published.Report`; 'head' says what the head is).

  Raises:
    UserError: there are no such weights, or they belong to another network.
  """
  net = state.params['net'], state.stats['net']
  if found := origin(source):
    params, stats, report = inherit(found, *net, class_names)
    taken = report._asdict()
  else:
    params, stats, report = pretrained(source, *net)
    taken = {
      **report._asdict(),
      'head': f'fresh: {len(class_names)} classes',
    }
  return _with_net(state, params, stats), taken


def keep_layers(
  *, kept: str, net: Network, image_shape: Sequence[int], layers: Sequence[Layer]
) -> Surgery:
  """Re-initialises all layers of the trunk except the first or the last ones.

  If the first ones are kept, the head and anything else after the trunk is
  re-initialised too.

  Args:
    kept: the layers that keep their weights, see `models.layers.chopped`.
    net: the stage's network.
    image_shape: (H, W, channels).
    layers: the layers of its trunk.

  Raises:
    UserError: there are no such layers.

  Source: Yosinski et al., NIPS 2014, arXiv 1411.1792, who copy the first n layers.
  """
  names = chopped(layers, kept)

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    params, stats = fresh.params['net'], fresh.stats['net']
    if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
      return fresh
    key = named_key(fresh.key, 'kept layers', 0)
    drawn = jax.jit(functools.partial(init_net, net))(key, jnp.zeros((1, *image_shape)))

    def with_drawn(own: PyTree, new: PyTree) -> PyTree:
      # What follows re-initialised layers is re-initialised too.
      rest = new if names and kept.startswith('first') else own
      trunk = {
        k: (new if k in names else own)['trunk'][k] for k in own.get('trunk', ())
      }
      return {**rest, 'trunk': trunk} if trunk else rest

    return _with_net(fresh, with_drawn(params, drawn[0]), with_drawn(stats, drawn[1]))

  return surgery


def anchor() -> Surgery:
  """Makes the optimiser take the current parameters as initial values, see `optim`."""

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    return fresh.replace(opt=anchored_here(fresh.opt, fresh.params))

  return surgery


def _with_net(state: State, params: PyTree, stats: PyTree) -> State:
  """Returns the State with other parameters and statistics for its network."""
  return state.replace(
    params={**state.params, 'net': params}, stats={**state.stats, 'net': stats}
  )


def carry(*, fields: Sequence[str], stage: str) -> Surgery:
  """Continues with the optimiser state, clock or memory of an earlier stage.

  Args:
    fields: names of State's fields: 'opt', 'step', 'memory'.
    stage: the stage they come from.

  Raises:
    UserError: a leaf is missing in one of the two stages, or has another shape.
  """
  carried = ('opt', 'step', 'memory')
  for field in fields:
    if field not in carried:
      raise UserError(f'carry has no field {field!r}{suggest(field, carried)}')

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    origin = earlier_stage(earlier, stage)
    for field in fields:
      ours, theirs = getattr(fresh, field), getattr(origin, field)
      missing = _by_path(theirs).keys() - _by_path(ours).keys()
      if missing:
        raise UserError(
          f'carry: {field} {min(missing)!r} of stage {stage!r} has no place here'
        )
      taken, _ = _replace(ours, theirs, '.*', stage, r'\g<0>')
      fresh = fresh.replace(**{field: taken})
    return fresh

  return surgery


def class_means(*, survey: Survey, split: str = 'train') -> Surgery:
  r"""Fills the memory of a stage with the mean feature of each class.

  .. math:: m_c = \frac{1}{n_c} \sum_{i: y_i = c} v_i

  over a whole split in stored order, without augmentation and in evaluation mode, with
  the network as earlier surgeries left it.

  Args:
    survey: passes over data with the stage's own network.
    split: the split whose images are used.

  Raises:
    UserError: the State has no memory of that shape, or a class has no image.

  Source: Liu et al., arXiv 1904.05160, section 3.2; the authors' code starts its second
  stage like this.
  """

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    outputs = survey.outputs(fresh, split)
    shape = (outputs['logits'].shape[-1], outputs['features'].shape[-1])

    def measure() -> np.ndarray:
      def fold(outputs, batch):
        return class_sums(outputs['features'], batch, shape[0])

      return _means(*survey.total(fresh, split, fold), split)

    return put(fresh, 'params/centroids', shape, measure)

  return surgery


def nearest_class_mean(*, survey: Survey, split: str = 'train') -> Surgery:
  """Fits the head of that name: the mean feature of all images, then of each class.

  This takes two passes, since features are centred and normalised before they are
  averaged by class.

  Args:
    survey: passes over data with the stage's own network.
    split: the split whose images are used.

  Raises:
    UserError: the stage has another head, or a class has no image.
  """

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    outputs = survey.outputs(fresh, split)
    width, classes = outputs['features'].shape[-1], outputs['logits'].shape[-1]

    def mean() -> np.ndarray:
      def fold(outputs, batch):
        mask = batch['mask'][:, None]
        return (outputs['features'] * mask).sum(0), mask.sum(dtype=jnp.float32)

      total, count = survey.total(fresh, split, fold)
      return total / count

    centred = put(fresh, 'params/net/head/centre', (width,), mean)

    def of_class(outputs, batch):
      centre = centred.params['net']['head']['centre']
      return class_sums(centred_unit(outputs['features'], centre), batch, classes)

    return put(
      centred,
      'params/net/head/means',
      (classes, width),
      lambda: _means(*survey.total(fresh, split, of_class), split),
    )

  return surgery


def class_sums(
  features: jax.Array, batch: Batch, num_classes: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the sum of the features of each class (C, D) and the counts (C,).

  Computed as a matrix product, which is reproducible; sums by index on a GPU are not.

  Args:
    features: (B, D).
    batch: has 'label' (B,) and 'mask' (B,).
    num_classes: C.
  """
  belongs = jax.nn.one_hot(batch['label'], num_classes) * batch['mask'][:, None]
  sums = jnp.einsum('bc,bd->cd', belongs, features, precision=lax.Precision.HIGHEST)
  return sums, belongs.sum(0)


def _means(sums: np.ndarray, counts: np.ndarray, split: str) -> np.ndarray:
  """Returns sums (C, D) over counts (C,), none of which may be zero."""
  if not counts.all():
    raise ClassError('', counts.argmin(), f' has no image in {split}, so no mean')
  return sums / counts[:, None]


def put(
  state: State, path: str, shape: tuple[int, ...], measure: Callable[[], np.ndarray]
) -> State:
  """Returns the State with one leaf replaced by a measurement.

  In a rehearsal it only checks the shape.

  Args:
    state: the State to change; in a rehearsal its leaves are shapes.
    path: the path of the leaf, such as 'params/centroids'.
    shape: the shape of the measurement.
    measure: makes the measurement (*shape).

  Raises:
    UserError: there is no such leaf, or it has another shape.
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
  paths = [_path(keys) for keys, _ in leaves]
  if path not in paths:
    raise UserError(f'there is no {path} here: method, head and surgery do not match')
  place = paths.index(path)
  values = [leaf for _, leaf in leaves]
  there = values[place]
  if there.shape != shape:
    raise UserError(
      f'{path} has shape {there.shape} here, but the measured value has {shape}'
    )
  if not isinstance(there, jax.ShapeDtypeStruct):
    values[place] = jnp.asarray(measure(), there.dtype)
  return treedef.unflatten(values)


SURGERIES = {
  'copy': copy,
  'carry': carry,
  'class_means': class_means,
  'nearest_class_mean': nearest_class_mean,
}


def operate(
  fresh: State, earlier: Mapping[str, State], surgeries: Sequence[Surgery]
) -> State:
  """Applies surgeries in order, and copies every leaf once.

  Without the copy, a leaf shared with another State would be lost to that State when
  the training step donates its buffers.
  """
  for surgery in surgeries:
    fresh = surgery(fresh, earlier)
  return jax.jit(lambda state: jax.tree.map(jnp.copy, state))(fresh)


def earlier_stage(earlier: Mapping[str, State], stage: str) -> State:
  """Returns the State of an earlier stage, or raises a `UserError` if there is none."""
  if stage not in earlier:
    known = earlier or ['no stage before this one']
    raise UserError(f'no finished stage {stage!r}{suggest(stage, known)}')
  return earlier[stage]


def _path(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _by_path(tree: PyTree) -> dict[str, jax.Array]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {_path(path): leaf for path, leaf in leaves}


def _replace(
  tree: PyTree, origin: PyTree, pattern: str, stage: str, source: str
) -> tuple[PyTree, int]:
  """Returns the tree with matching leaves taken from `origin`, and their number."""
  leaves = _by_path(origin)
  taken = 0

  def leaf(path, ours):
    nonlocal taken
    match = re.fullmatch(pattern, _path(path))
    if not match:
      return ours
    name = match.expand(source)
    theirs = leaves.get(name)
    if theirs is None or theirs.shape != ours.shape:
      there = 'absent' if theirs is None else theirs.shape
      raise UserError(
        f'{match[0]} is {ours.shape} here, but in stage {stage!r} {name} is {there}'
      )
    taken += 1
    return theirs

  return jax.tree_util.tree_map_with_path(leaf, tree), taken
