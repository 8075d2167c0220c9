"""MS1M-LT with ResNet-50: the faces of open long-tailed recognition.

  python -m lt_jax.main --config=configs/ms1m_lt.py:oltr --workdir=gs://BUCKET/oltr \
    --config.data.source=list:LISTS --config.data.dir=IMAGES

Data: lists for a folder of aligned faces of 112 x 112 pixels, with lines of `path
label`. LISTS holds train.txt, labels 0 to C - 1, and the lists for identification:

  gallery.txt      one or more images of each identity that can be found
  probe.txt        the images to identify; their identities are in the gallery
  distractors.txt  images of people who are not in the probes, all labelled -1; optional
  test.txt         more images of trained identities, used for classification only;
                   optional if the gallery or the probes have trained identities

Labels of C and above in gallery and probes are identities not in training. MS1M-LT has
887,500† images of 74,500† identities, 598† to 1† of each, and is tested on MegaFace
(the lists are the authors'; you have to make gallery and probes from MegaFace's own).
If you have no data, train on generated images: --config.data.source=fake.

Metrics: `rank1` is the share of probes whose nearest image among gallery and
distractors, by cosine similarity of features, has the same identity. It is also split
by the identity's number of training images: `rank1_many` (over 20), `_medium`, `_few`
(2 to 4), `_one` and `_zero`. For 1:1 verification there are `verification_accuracy` and
the true positive rates at false positive rates of 1e-3 and 1e-6. The classification
metrics cover images of trained identities. No checkpoint is ever selected by any of
these: the last one is evaluated.

Published: rates on MegaFace (Liu et al., CVPR 2019), of which we have none to quote. No
code for it was released, so everything here except the method is ours: batch size,
learning rates, epochs, stem, the bounds of the shot groups, and the use of one gallery
for all probes, where MegaFace looks for one identity at a time (see
lt_jax/evals/identification.py).

† quoted from memory, unverified.

Cost: `oltr` takes 34,668 + 34,660 steps of 512 images; not run, except for miniatures.
`plan` says what that needs:

  python -m lt_jax.plan --config=configs/ms1m_lt.py:oltr --devices=v5e:4x4

Argument: a recipe (see docs/methods.md; the paper compares ce, range and oltr†) and
  net         resnet50, or resnet10, 18, 34, 101, 152, resnext50_32x4d
  epochs      20, in the first stage; all stages scale with it
"""

from lt_jax.protocols import photographs


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'oltr', 'range,net=resnet18', ..."""
  return photographs.photographs_lt(arg, name='ms1m_lt', recipe='oltr')
