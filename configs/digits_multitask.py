r"""Several tasks at once on the embedded digits: which digit, its shape, and its ink.

  python -m lt_jax.main --config=configs/digits_multitask.py:multitask --workdir=runs/a

The images are half of scikit-learn's digits (599 to train on, 299 to test), each with
four labels: the digit, round or straight, even or odd, and the mean of its pixels. They
are tasks of the kinds softmax and regression; the digit is the network's own task.

Every weighting beside its controls, networks that learn one task alone, is two sweeps
into one folder; its report has the relative gain over the controls:

  python -m lt_jax.sweep --config=configs/digits_multitask.py --seeds=0,1,2 \
    --methods=multitask,multitask_uncertainty,multitask_dynamic --workdir=runs/tasks
  python -m lt_jax.sweep --config=configs/digits_multitask.py --methods=multitask \
    --seeds=0,1,2 --grid=method.only=label,coarse,parity,ink --workdir=runs/tasks

The best fixed weights are chosen by validation images. `val=6` takes six of each digit
from the training images; give it to the two sweeps above as well, as only runs on the
same images are compared:

  python -m lt_jax.sweep --config=configs/digits_multitask.py:val=6 --seeds=0,1,2 \
    --methods=multitask --grid=method.weights.ink=0.1,0.25,1 --workdir=runs/tasks

There is no published number.

Cost: 470 steps of 32 images, some seconds on two CPU cores.

Argument: a recipe (multitask, multitask_uncertainty or multitask_dynamic) and
  labelled  1, the share of images that have the labels of the other tasks
  val       0, validation images of each digit
  epochs    25; the schedule scales
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import Protocol, cosine, train_by


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'multitask', 'multitask_uncertainty', ..."""
  recipe, option = parse_arg(arg, 'multitask', labelled=1.0, val=0, epochs=0.0)
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
        'val_per_class': option.val,
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
