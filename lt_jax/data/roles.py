"""Roles of test images in identification, as in face recognition.

A probe is an image to identify; the gallery has images of known identities, including
each probe's; distractors show people who are not in the probes. Identities 0 ... C - 1
are the training classes. Others are never trained on: they are zero-shot.
"""

from collections.abc import Mapping

import numpy as np

ROLES = ('gallery', 'probe', 'distractors')
"""Names of lists; the position in this tuple is the number of the role."""

GALLERY, PROBE, DISTRACTOR = range(3)

NO_ROLE = -1
"""For ordinary test images, which are only classified."""


def attributes(identities: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the attributes of test images that have roles.

  Args:
    identities: 'test' or a name of `ROLES` -> (n,) int identities, in the order of the
      images.

  Returns:
    'role' and 'identity' (N,) int32.
  """
  numbers = {name: number for number, name in enumerate(ROLES)}
  roles = [np.full(len(y), numbers.get(k, NO_ROLE)) for k, y in identities.items()]
  return {
    'role': np.concatenate(roles).astype(np.int32),
    'identity': np.concatenate([*identities.values()]).astype(np.int32),
  }
