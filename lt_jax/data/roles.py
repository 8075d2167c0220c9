"""Roles of test images where identities are looked for, as in face recognition.

A probe is an image whose identity is asked for; the gallery has images of known
identity, among them one of each probe's; distractors are of nobody who is asked for.
Identities 0 ... C - 1 are the classes that are trained on. Others are never trained on:
they are zero-shot.
"""

from collections.abc import Mapping

import numpy as np

ROLES = ('gallery', 'probe', 'distractors')
"""Names of lists; the place in this tuple is the number of the role."""

GALLERY, PROBE, DISTRACTOR = range(3)

NO_ROLE = -1
"""Of ordinary test images, which are classified and nothing else."""


def attributes(identities: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns what batches tell of test images that have roles.

  Args:
    identities: 'test' or a name of `ROLES` -> (n,) int identities, in the order in
      which the images follow each other.

  Returns:
    'role' and 'identity' (N,) int32.
  """
  numbers = {name: number for number, name in enumerate(ROLES)}
  roles = [np.full(len(y), numbers.get(k, NO_ROLE)) for k, y in identities.items()]
  return {
    'role': np.concatenate(roles).astype(np.int32),
    'identity': np.concatenate([*identities.values()]).astype(np.int32),
  }
