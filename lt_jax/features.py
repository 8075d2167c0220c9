"""Computes features of labelled images with a network.

The network is that of a run or an export of ours, or a trunk with published weights.
The images come from any data source, or are those that a run was trained on. Stored
features need no network.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lt_jax import export, trained
from lt_jax.build.domains import NOT_LOADING
from lt_jax.config import SOURCE, domain_data
from lt_jax.data import augment
from lt_jax.data.crops import Crop
from lt_jax.data.dataset import load_dataset
from lt_jax.data.resizing import brought_to
from lt_jax.data.streams import Split
from lt_jax.errors import UserError, class_names
from lt_jax.method import forward
from lt_jax.models import make_classifier
from lt_jax.pretrained import ours
from lt_jax.pretrained.dialects import pixels
from lt_jax.pretrained.published import pretrained

BATCH = 64

SIZES = ('size', 'channels', 'image_size', 'resize')
"""Keys of a run's data for which the network of another run has its own values."""


class Network(NamedTuple):
  """A network that computes features of images.

  Attributes:
    name: the name of its weights.
    see: (B, H, W, channels) images as stored -> 'features' (B, D) and, for a network of
      ours, 'probabilities' (B, C) of its own classes.
    shape: (H, W, channels) of its input.
    crop: how photographs are cropped to that size.
    class_names: the classes of its own head; empty without one.
  """

  name: str
  see: Callable[[Any], dict[str, jax.Array]]
  shape: tuple[int, int, int]
  crop: Crop
  class_names: tuple[str, ...] = ()


class Seen(NamedTuple):
  """Features of labelled images.

  Attributes:
    name: the name of the data.
    features: (N, D) float32.
    labels: (N,) int32, -1 for images without a class.
    class_names: names of the C classes.
    digests: (N,) digests of the images as stored, to find copies in other data.
    probabilities: (N, Z) for the network's own classes; None without a head.
  """

  name: str
  features: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  digests: np.ndarray
  probabilities: np.ndarray | None = None


def network(source: str, trunk: str = '', size: int = 224) -> Network:
  """Opens a network.

  Args:
    source: the folder of a run, an export of one, or published weights.
    trunk: the trunk that published weights belong to.
    size: side of the images that they get.

  Raises:
    UserError: there is no such network, or published weights have no `trunk`.
  """
  found = ours.origin(source)
  if found is None:
    return _published(source, trunk, size)
  if found.is_file:
    opened = export.load(epath.Path(source))
  else:
    opened = trained.open_run(epath.Path(source).expanduser(), batch=BATCH)
    opened.check_whole(source)
  shape = tuple(opened.facts['image_shape'])
  see = jax.jit(opened.predict)

  def look(images: np.ndarray) -> dict[str, jax.Array]:
    outputs = see(opened.state, images)
    shares = outputs['probabilities']  # which sigmoids do not add up to one
    shares = shares / shares.sum(-1, keepdims=True)
    return {'features': outputs['features'], 'probabilities': shares}

  crop = opened.crop or Crop(shape[0], round(shape[0] * 8 / 7))
  return Network(source, look, shape, crop, opened.class_names)


def _published(source: str, trunk: str, size: int) -> Network:
  """Returns a trunk with published weights."""
  if not trunk:
    raise UserError(
      f'{source} is not a run of ours: name its network, such as '
      '--net=efficientnet_lite0'
    )
  net = make_classifier(trunk, 'linear', 2)
  shape = (size, size, 3)

  def init(key: jax.Array) -> Any:
    return net.init(key, jnp.zeros((1, *shape)), train=False)

  fresh = jax.jit(init)(jax.random.key(0))
  params, stats, _ = pretrained(source, fresh['params'], fresh.get('batch_stats', {}))
  expected = pixels(trunk)

  @jax.jit
  def see(params: Any, stats: Any, images: jax.Array) -> jax.Array:
    images = augment.normalise(images, expected['mean'], expected['std'])
    return forward(net, params, stats, images, train=False)[0]['features']

  return Network(
    source,
    lambda images: {'features': see(params, stats, images)},
    shape,
    Crop(size, round(size * 8 / 7)),
  )


def seen(spec: str, net: Network | None, *, split: str = 'train') -> Seen:
  """Returns the features of the images of a data source.

  Args:
    spec: such as 'folder:DIR', 'tfds:NAME' or 'npz:FILE'; or the folder of a run, for
      the images that its last stage was trained on. If an 'npz:' holds features (N, D),
      they are returned as they are, unless the network takes features.
    net: the network; None if all data are stored features.
    split: 'train', or another split of the source.

  Raises:
    UserError: the data do not exist or do not suit the network, or a feature is not
      finite.
  """
  data = _images(spec, net, split)
  labels, names = data.labels, data.source.class_names
  probabilities = None
  takes_features = net is not None and net.shape[:2] == (1, 1)
  if takes_features and net.shape != data.image_shape:
    raise UserError(
      f'{spec}: {net.name} takes features of {net.shape[2]} values, not '
      f'{" x ".join(map(str, data.image_shape))}'
    )
  if data.dtype != np.uint8 and data.image_shape[:2] == (1, 1) and not takes_features:
    stored = [np.asarray(data.source[int(row)]) for row in data.rows]
    features = np.stack(stored).reshape(len(stored), -1).astype(np.float32)
    digests = [_digest(one) for one in stored]
  else:
    if net is None:
      raise UserError(f'{spec} has images but no features: name a network with --init')
    features, probabilities, digests = _looked_at(data, net)
  bad = ~np.isfinite(features).all(1)
  if bad.any():
    raise UserError(f'{spec}: the features of image {bad.argmax()} are not finite')
  return Seen(spec, features, labels, tuple(names), np.array(digests), probabilities)


def _images(spec: str, net: Network | None, split: str) -> Split:
  """Returns the images of a split, at the size that the network sees."""
  folder = epath.Path(spec).expanduser()
  options: dict[str, Any] = {'source': spec}
  if ':' not in spec and folder.is_dir():
    config = trained.read_config(folder)
    stage = config['stages'].get(config['stage_order'][-1], {})
    name = stage.get('domain', config['domain'])
    sources = config['sources']
    if name == SOURCE and sources:
      if len(sources) > 1:
        raise UserError(f'{spec} was trained on several sources: give them one by one')
      name = sources[0]
    data = domain_data(config, name)
    aside = (*NOT_LOADING, *SIZES)
    options = {key: value for key, value in data.items() if key not in aside}
  try:
    dataset = _load(options, net, photographs=False)
  except UserError as error:
    if 'differ in size' not in str(error):
      raise
    dataset = _load(options, net, photographs=True)
  if split not in dataset.every:
    raise UserError(f'{spec} has no split {split!r}, only {", ".join(dataset.every)}')
  found = dataset.every[split]
  with class_names(dataset.class_names):
    source = found.source
  if net is not None and found.dtype == np.uint8 and found.crop is None:
    height, width, channels = net.shape
    if height != width:
      raise UserError(
        f'{net.name} takes {height} x {width} pixels, which is not square'
      )
    source = brought_to(source, height, channels, spec)
  return found._replace(source=source)


def _load(options: dict[str, Any], net: Network | None, *, photographs: bool) -> Any:
  """Loads data; sources without a test split get the training split as one."""
  more: dict[str, Any] = {}
  if photographs:
    if net is None:
      raise UserError(
        f'{options["source"]} has photographs: name a network with --init'
      )
    more = {'image_size': net.crop.size, 'resize': net.crop.resize}
  every = {'to_device': lambda images: {}, **options, **more}
  try:
    return load_dataset(**every)
  except UserError as error:
    if 'has no test split' not in str(error):
      raise
    return load_dataset(**every, test_split=options.get('train_split', 'train'))


def _looked_at(
  data: Split, net: Network
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
  """Returns features, probabilities and digests of images, in batches of one shape."""
  collected: dict[str, list[np.ndarray]] = {}
  digests: list[str] = []
  for start in range(0, len(data.rows), BATCH):
    rows = data.rows[start : start + BATCH]
    images = np.stack([data.image(row) for row in rows])
    digests += [_digest(image) for image in images]
    padded = np.concatenate([images, np.repeat(images[-1:], BATCH - len(rows), 0)])
    for name, value in jax.device_get(net.see(padded)).items():
      collected.setdefault(name, []).append(value[: len(rows)])
  joined = {name: np.concatenate(parts) for name, parts in collected.items()}
  return joined['features'], joined.get('probabilities'), digests


def _digest(image: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:24]
