r"""Several tasks at once on the embedded digits: which digit, its shape, and its ink.

  python -m lt_jax.main --config=configs/digits_multitask.py:multitask --workdir=runs/a

The images are half of scikit-learn's digits (599 for training, 299 for testing), each
with four labels: the digit, round or straight, even or odd, and the mean of its pixels.
These are tasks of the kinds softmax and regression; the digit is the network's main
task.

To compare every weighting with its controls, networks that learn a single task, run two
sweeps into one folder. The report shows the relative gain over the controls:

  python -m lt_jax.sweep --config=configs/digits_multitask.py --seeds=0,1,2 \
    --methods=multitask,multitask_uncertainty,multitask_dynamic --workdir=runs/tasks
  python -m lt_jax.sweep --config=configs/digits_multitask.py --methods=multitask \
    --seeds=0,1,2 --grid=method.only=label,coarse,parity,ink --workdir=runs/tasks

There is no published number.

Cost: 470 steps of 32 images, a few seconds on two CPU cores.

Argument: a recipe (multitask, multitask_uncertainty or multitask_dynamic) and
  labelled  1, the share of images that have the labels of the other tasks
  epochs    25; the schedule scales with it
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import Protocol, cosine, train_by


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'multitask', 'multitask_uncertainty', ..."""
  recipe, option = parse_arg(arg, 'multitask', labelled=1.0, epochs=0.0)
  spec = 'digits_tasks:fine'
  config = apply(
    base_config(),
    {
      'name': 'digits_multitask',
      'data': {
        'source': spec if option.labelled == 1 else f'{spec},{option.labelled:g}',
        'mean': (0.306,),
        'std': (0.377,),
        'pad': 1,
        'many_shot': 80,
        'few_shot': 20,
      },
      'heads': {
        'coarse': {'kind': 'softmax', 'outputs': 2},
        'parity': {'kind': 'softmax', 'outputs': 2},
        'ink': {'kind': 'regression', 'outputs': 1},
      },
    },
  )
  training = Protocol(
    {
      'batch': 32,
      'eval_batch': 100,
      **cosine(25.0, base=0.05),
      'save_every_epochs': 12.5,
      'evaluate_every_epochs': 12.5,
      'model': {'trunk': 'digits_cnn'},
    }
  )
  return train_by(config, recipe, training, epochs=option.epochs)
