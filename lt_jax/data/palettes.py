"""The class colours that data sets use."""

from collections.abc import Sequence

import numpy as np

CITYSCAPES = {
  'road': (128, 64, 128),
  'sidewalk': (244, 35, 232),
  'building': (70, 70, 70),
  'wall': (102, 102, 156),
  'fence': (190, 153, 153),
  'pole': (153, 153, 153),
  'traffic light': (250, 170, 30),
  'traffic sign': (220, 220, 0),
  'vegetation': (107, 142, 35),
  'terrain': (152, 251, 152),
  'sky': (70, 130, 180),
  'person': (220, 20, 60),
  'rider': (255, 0, 0),
  'car': (0, 0, 142),
  'truck': (0, 0, 70),
  'bus': (0, 60, 100),
  'train': (0, 80, 100),
  'motorcycle': (0, 0, 230),
  'bicycle': (119, 11, 32),
}
"""Train ids 0 to 18, in that order."""

CAMVID = {
  'Sky': (128, 128, 128),
  'Building': (128, 0, 0),
  'Pole': (192, 192, 128),
  'Road': (128, 64, 128),
  'Pavement': (60, 40, 222),
  'Tree': (128, 128, 0),
  'SignSymbol': (192, 128, 128),
  'Fence': (64, 64, 128),
  'Car': (64, 0, 128),
  'Pedestrian': (64, 64, 0),
  'Bicyclist': (0, 128, 192),
}
"""The 11 classes of SegNet, in that order."""

VOC = (
  'background',
  'aeroplane',
  'bicycle',
  'bird',
  'boat',
  'bottle',
  'bus',
  'car',
  'cat',
  'chair',
  'cow',
  'diningtable',
  'dog',
  'horse',
  'motorbike',
  'person',
  'pottedplant',
  'sheep',
  'sofa',
  'train',
  'tvmonitor',
)


def numbered(number: int) -> tuple[int, int, int]:
  """Returns the colour of a class number in Pascal VOC's colour map.

  The bits of the number are dealt to red, green and blue, filling the highest first.
  """
  colour = [0, 0, 0]
  for place in range(8):
    for channel in range(3):
      colour[channel] |= ((number >> (3 * place + channel)) & 1) << (7 - place)
  return tuple(colour)


def palette(class_names: Sequence[str]) -> np.ndarray:
  """Returns (C, 3) uint8, the colours of classes.

  They are those of Cityscapes or CamVid if these have all the classes, else those of
  Pascal VOC by number.
  """
  for known in (CITYSCAPES, CAMVID):
    if set(class_names) <= known.keys():
      return np.array([known[name] for name in class_names], np.uint8)
  first = 0 if tuple(class_names) == VOC else 1  # others have no black class
  return np.array([numbered(i + first) for i in range(len(class_names))], np.uint8)


def of_colours(colours: np.ndarray) -> str:
  """Returns the data set whose palette has all colours (N, 3); '' if none does."""
  seen = {tuple(colour) for colour in np.unique(colours, axis=0)[:300].tolist()}
  seen -= {(0, 0, 0), (255, 255, 255), (224, 224, 192)}  # void
  known = {
    'Cityscapes': {*CITYSCAPES.values()},
    'CamVid': {*CAMVID.values()},
    'Pascal VOC': {numbered(i) for i in range(len(VOC))},
  }
  return next((name for name, all_ in known.items() if seen and seen <= all_), '')
