"""MS1M-LT with ResNet-50: the faces of open long-tailed recognition.

  python -m lt_jax.main --config=configs/ms1m_lt.py:oltr --workdir=gs://BUCKET/oltr \
    --config.data.source=list:LISTS --config.data.dir=IMAGES

Data: lists over a folder of aligned faces of 112 x 112 pixels, lines of `path label`.
LISTS holds train.txt, labels 0 to C - 1, and what identities are looked for among:

  gallery.txt      an image, or several, of each identity that can be found
  probe.txt        images that are looked for; their identities are in the gallery
  distractors.txt  images of nobody who is looked for; all labels are -1; may be absent
  test.txt         more images of trained identities, which are only classified; may be
                   absent where the gallery or the probes have such

Labels of gallery and probes from C on are identities that are not trained on. MS1M-LT
has 887,500† images of 74,500† identities, 598† to 1† of each, and is tested on MegaFace
(the lists are the authors'; gallery and probes are to be made from MegaFace's own).
Without data: --config.data.source=fake.

Measured: `rank1`, the share of probes whose nearest image in gallery and distractors,
by the cosine of features, is of their identity; the same by training images of the
identity, `rank1_many` (over 20), `_medium`, `_few` (2 to 4), `_one` and `_zero`; and
1:1 verification, `verification_accuracy` and true positive rates at false positive
rates of 1e-3 and 1e-6. Beside them are the metrics of classification, of images of
trained identities. A State is never chosen by any of these: the last one counts.

Published: rates on MegaFace (Liu et al., CVPR 2019), of which we have none to quote. No
code for it was, so everything here but the method is ours: batch, rates, epochs, stem,
the bounds of the shot groups, and that a gallery is one for all probes, where MegaFace
looks for one identity at a time (see lt_jax/evals/identification.py).

† quoted from memory, unverified.

Cost: `oltr` makes 34,668 + 34,660 steps of 512 images; not run, but for miniatures.
`plan` tells what that takes:

  python -m lt_jax.plan --config=configs/ms1m_lt.py:oltr --devices=v5e:4x4

Argument: a recipe (see docs/methods.md; the paper compares ce, range and oltr†) and
  net         resnet50, or resnet10, 18, 34, 101, 152, resnext50_32x4d
  epochs      20, of the first stage; all stages scale
"""

from lt_jax.protocols import photographs


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'oltr', 'range,net=resnet18', ..."""
  return photographs.photographs_lt(arg, name='ms1m_lt', recipe='oltr')
