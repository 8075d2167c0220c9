"""tf.data's fused decoding and cropping of image files, as a worker process.

Started by the benchmark, possibly with another Python. For each line `FOLDER COUNT` on
standard input, where FOLDER is a position in the list of folders, it passes over the
folder until it has made COUNT crops, and answers with the seconds that took. Its resize
is bilinear without antialiasing, as is usual in such pipelines.
"""

import argparse
import os
import pathlib
import sys
import time

os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'

import tensorflow as tf  # noqa: E402


def random_crop(path, size):
  """Returns a random crop of a file as (size, size, 3) uint8."""
  encoded = tf.io.read_file(path)
  begin, shape, _ = tf.image.sample_distorted_bounding_box(
    tf.image.extract_jpeg_shape(encoded),
    tf.zeros([0, 0, 4]),
    aspect_ratio_range=(3 / 4, 4 / 3),
    area_range=(0.08, 1.0),
    max_attempts=10,
    use_image_if_no_bounding_boxes=True,
  )
  window = tf.concat([begin[:2], shape[:2]], 0)
  image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
  return tf.cast(tf.round(tf.image.resize(image, [size, size])), tf.uint8)


def make_batches(folder, size, batch):
  """Returns an endless iterator of batches, made by one thread."""
  paths = sorted(map(str, pathlib.Path(folder).glob('*.jpg')))
  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  options.autotune.enabled = False
  # Otherwise it works ahead while other sides are timed.
  options.experimental_optimization.apply_default_optimizations = False
  data = tf.data.Dataset.from_tensor_slices(paths).repeat()
  data = data.map(lambda path: random_crop(path, size)).batch(batch)
  return iter(data.with_options(options))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--size', type=int, required=True)
  parser.add_argument('--batch', type=int, required=True)
  parser.add_argument('folders', nargs='+')
  options = parser.parse_args()
  tf.config.threading.set_intra_op_parallelism_threads(1)
  tf.config.threading.set_inter_op_parallelism_threads(1)
  batches = [make_batches(f, options.size, options.batch) for f in options.folders]
  print(f'ready {tf.__version__}', flush=True)
  for line in sys.stdin:
    folder, count = map(int, line.split())
    began = time.perf_counter()
    while count > 0:
      count -= len(next(batches[folder]).numpy())
    print(time.perf_counter() - began, flush=True)


if __name__ == '__main__':
  main()
