r"""Specialised pre-training in one run: your source, then your target.

  python -m lt_jax.main --workdir=runs/birds \
    --config=configs/transfer.py:frozen,source=folder:animals,target=folder:birds

The stage `source` trains on the source from random weights (or --config.init=WEIGHTS);
the recipe then fine-tunes on the target. Several sources, joined by +, are merged into
their union, in which classes stay separate unless the sources have the same classes.
--config.stages.source.domain=source1 uses only the first, source2 the second. So one
sweep runs the ablation over sources and makes one table: all classes, each source
alone, and the classes that `lt_jax.similarity` kept:

  python -m lt_jax.sweep --methods=ce --workdir=runs/sources \
    --config=configs/transfer.py:source=A+B,target=T,kept=A,keep=keep_classes.txt \
    --grid=stages.source.domain=source,source1,source2,kept

If there are no test images, they are split off the training images, as in my_images.py.
Without source and target photographs are generated, so you can check that everything
runs.

There is no published number for these exact runs; those of the paper (Cui et al., CVPR
2018, arXiv 1806.06193) are in docs/tools.md, under `lt_jax.similarity`.

Cost: that of configs/my_images.py, once for each stage.

Argument: a recipe (see docs/methods.md; `ce` fine-tunes everything) and
  source         a source such as folder:DIR, tfds:NAME or npz:FILE; several joined by +
  target         likewise
  kept, keep     a source of which only some classes are used, and the file that lists
                 them; this is the domain `kept`
  net            resnet18, or any trunk of configs/my_images.py
  size           128, side of the images that the network sees; 0 if all have one size
  source_epochs  60
  epochs         30, on the target; schedules scale with it
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.pretrained.dialects import pixels
from lt_jax.protocols import Protocol, cosine
from lt_jax.protocols.cutting import cut
from lt_jax.protocols.transfer import transferred


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'frozen,source=folder:A,target=folder:B', ..."""
  recipe, option = parse_arg(
    arg,
    'ce',
    source='fake',
    target='fake',
    kept='',
    keep='',
    net='resnet18',
    size=128,
    source_epochs=60.0,
    epochs=30.0,
  )
  named = option.source.split('+')
  sources = tuple(f'source{i + 1}' for i in range(len(named)))
  specs = {**dict(zip(sources, named, strict=True)), 'task': option.target}
  domains = {name: domain(spec) for name, spec in specs.items()}
  if option.kept:
    domains['kept'] = {**domain(option.kept), 'keep_classes': option.keep}
  config = apply(
    base_config(),
    {
      'name': 'transfer',
      'data': {
        'many_shot': 0,
        'few_shot': 0,
        'image_size': option.size,
        'resize': round(option.size * 8 / 7),
        'flip': True,
        'jitter': 0.4,
        **pixels(option.net),
        'on_bad_image': 'skip',
        'workers': -1,
      },
      'domains': domains,
      'sources': sources,
      'domain': 'task',
      'model': {'trunk': option.net},
    },
  )
  protocol = Protocol(
    {
      'batch': 32,
      'eval_batch': 64,
      'optimizer': {
        'name': 'sgd',
        'momentum': 0.9,
        'nesterov': True,
        'weight_decay': (('.*', 5e-4),),
      },
      **cosine(30.0, base=0.02),
      'save_every_epochs': 5.0,
      'evaluate_every_epochs': 5.0,
    }
  )
  source = {
    'domain': 'source' if len(sources) > 1 else 'source1',
    'epochs': option.source_epochs,
    'schedule': {'name': 'cosine', 'base': 0.02, 'end': option.source_epochs},
  }
  return transferred(config, recipe, protocol, source, option.epochs)


def domain(spec: str):
  """Returns the data overrides for a source, such as 'folder:DIR'."""
  if spec == 'fake':
    fake = base_config().data.fake.to_dict()
    return {'source': 'fake', 'fake': {**fake, 'image_size': 0}}
  return {'source': spec, **{k: v for k, v in cut(spec, '').items() if k[:4] == 'test'}}
