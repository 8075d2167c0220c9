"""EfficientNet-Lite0 on the CPU with two implementations of depthwise convolution.

  python -m benchmarks.depthwise [--json=FILE]

Times a forward pass and a training step (SGD) with the sum of shifted images, which the
library uses on CPUs, and with XLA's grouped convolution (one group per channel), which
it uses elsewhere. A third side also leaves 1x1 convolutions to XLA. Sides take turns
within one run; the table shows medians over the rounds, of times and of ratios within a
round.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from lt_jax import sharding
from lt_jax.models import convolution, make_classifier

FORMS = {
  'shifted': (),
  'shifted, 1x1 by XLA': ('_pixel_by_pixel',),
  'grouped': ('_shifted_products', '_pixel_by_pixel'),
}
"""Side -> the functions of `convolution` that XLA's own convolution replaces."""


def by_xla(groups):
  """Returns XLA's replacement for a function of `convolution`."""

  def convolved(x, kernel, stride=1, padding=((0, 0), (0, 0)), dilation=1):
    x = convolution._unfused(x)
    count = x.shape[-1] if groups else 1
    return convolution._unfused(
      convolution._convolved(x, kernel, stride, count, padding, dilation)
    )

  return convolved


def compiled(form, kind, net, variables, images):
  """Returns the compiled function of a kind: 'forward' or 'training'."""
  replaced = {name: getattr(convolution, name) for name in FORMS[form]}
  for name in replaced:
    setattr(convolution, name, by_xla(groups=name == '_shifted_products'))
  function = {'forward': forward, 'training': step}[kind]
  try:
    lowered = jax.jit(lambda v, x: function(net, v, x)).lower(variables, images)
  finally:
    for name, own in replaced.items():
      setattr(convolution, name, own)
  return lowered.compile(sharding.compiler_options())


def forward(net, variables, images):
  """Returns the logits."""
  return net.apply(variables, images, train=False)['logits']


def step(net, variables, images):
  """Returns the variables after a step of gradient descent on a simple loss."""

  def loss(params):
    outputs, updated = net.apply(
      variables | {'params': params}, images, train=True, mutable=['batch_stats']
    )
    return jax.nn.logsumexp(outputs['logits'], axis=-1).mean(), updated

  grads, updated = jax.grad(loss, has_aux=True)(variables['params'])
  params = jax.tree.map(lambda p, g: p - 0.01 * g, variables['params'], grads)
  return updated | {'params': params}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--size', type=int, default=128, help='pixels')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=1, help='per round')
  parser.add_argument('--json', default=None)
  options = parser.parse_args()

  net = make_classifier('efficientnet_lite0', 'linear', 100)
  shape = (options.batch, options.size, options.size, 3)
  images = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  key = jax.random.key(0)
  variables = jax.jit(lambda: net.init(key, images[:1], train=False))()
  kind = jax.devices()[0].device_kind
  print(
    f'EfficientNet-Lite0, {options.batch} images of {options.size} pixels, JAX '
    f'{jax.__version__} on {kind}; {options.rounds} rounds of {options.steps} in turn'
  )
  table = {}
  for what in ('forward', 'training'):
    programs, sides = {}, {}
    for form in FORMS:
      began = time.perf_counter()
      program = compiled(form, what, net, variables, images)
      programs[form] = {
        'compile_seconds': time.perf_counter() - began,
        'temporary_bytes': program.memory_analysis().temp_size_in_bytes,
      }

      def run(steps, program=program):
        began = time.perf_counter()
        for _ in range(steps):
          jax.block_until_ready(program(variables, images))
        return time.perf_counter() - began

      sides[form] = run
    seconds = timing.in_turn(sides, options.rounds, options.steps)
    for form, taken in seconds.items():
      median = statistics.median(taken)
      over = timing.ratio(taken, seconds['shifted'])
      table[f'{what}, {form}'] = {
        'seconds': median,
        'fastest': min(taken),
        'images_per_second': options.batch / median,
        'over_shifted': over,
        **programs[form],
      }
      print(
        f'  {what:9s}{form:21s}{1e3 * median:9.1f} ms{options.batch / median:8.1f} '
        f'images/s   {over:6.2f} of shifted   '
        f'{programs[form]["temporary_bytes"] / 2**20:6.0f} MiB   compiled in '
        f'{programs[form]["compile_seconds"]:.0f} s'
      )
  report = {
    'batch': options.batch,
    'size': options.size,
    'rounds': options.rounds,
    **timing.facts(),
    'sides': table,
  }
  timing.write_report(options.json, report)


if __name__ == '__main__':
  main()
