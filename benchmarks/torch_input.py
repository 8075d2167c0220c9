"""torchvision's transforms on image files, as a worker process.

Started by the benchmark, possibly with another Python. For each line `FOLDER COUNT` on
standard input, where FOLDER is a position in the list of folders, it passes over the
folder until it has made COUNT crops, and answers with the seconds that took.
"""

import argparse
import itertools
import pathlib
import sys
import time

import torch
import torchvision
from PIL import Image
from torchvision import transforms


class Images(torch.utils.data.Dataset):
  """Random crops of the files in a folder."""

  def __init__(self, folder, size):
    self.paths = sorted(pathlib.Path(folder).glob('*.jpg'))
    crop = transforms.RandomResizedCrop(size)
    self.transform = transforms.Compose([crop, transforms.PILToTensor()])

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, position):
    with open(self.paths[position], 'rb') as file:
      return self.transform(Image.open(file).convert('RGB'))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--size', type=int, required=True)
  parser.add_argument('--batch', type=int, required=True)
  parser.add_argument('folders', nargs='+')
  options = parser.parse_args()
  torch.set_num_threads(1)
  loaders = [
    torch.utils.data.DataLoader(
      Images(folder, options.size), options.batch, shuffle=True
    )
    for folder in options.folders
  ]
  print(f'ready {torch.__version__} {torchvision.__version__}', flush=True)
  for line in sys.stdin:
    folder, count = map(int, line.split())
    batches = itertools.chain.from_iterable(itertools.repeat(loaders[folder]))
    began = time.perf_counter()
    while count > 0:
      count -= len(next(batches))
    print(time.perf_counter() - began, flush=True)


if __name__ == '__main__':
  main()
