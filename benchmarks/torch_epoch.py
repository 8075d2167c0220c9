"""A whole CIFAR-10-LT run in plain PyTorch, as a separate process.

Started by `epoch.py`, possibly with another Python. Reads an .npz of x_train, y_train,
x_test and y_test, trains, evaluates after every epoch, and prints the seconds it took.
"""

import argparse
import time

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torch_step import resnet

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Images(Dataset):
  """Images in memory; for training padded, randomly cropped and flipped."""

  def __init__(self, images, labels, training):
    self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    self.labels = torch.from_numpy(labels.astype(np.int64))
    self.training = training
    self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, number):
    image = self.images[number]
    if self.training:
      top, left, flipped = torch.randint(9, (2,)).tolist() + [torch.rand(()) < 0.5]
      image = functional.pad(image, (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
      image = image.flip(2) if flipped else image
    return (image.float() / 255 - self.mean) / self.std, self.labels[number]


def accuracy(net, batches, device):
  """Returns the share of correctly classified images."""
  net.eval()
  right = count = 0
  with torch.no_grad():
    for images, labels in batches:
      found = net(images.to(device)).argmax(1)
      right += int((found == labels.to(device)).sum())
      count += len(labels)
  return right / count


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--data', required=True)
  parser.add_argument('--depth', type=int, required=True)
  parser.add_argument('--epochs', type=int, required=True)
  parser.add_argument('--workers', type=int, required=True)
  options = parser.parse_args()
  began = time.perf_counter()
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.manual_seed(0)
  torch.backends.cudnn.benchmark = True
  with np.load(options.data, allow_pickle=False) as stored:
    train = Images(stored['x_train'], stored['y_train'], True)
    test = Images(stored['x_test'], stored['y_test'], False)
  loading = {'num_workers': options.workers, 'pin_memory': device == 'cuda'}
  if options.workers:
    loading['persistent_workers'] = True
  training = DataLoader(train, 128, shuffle=True, drop_last=True, **loading)
  testing = DataLoader(test, 1000, **loading)
  net = resnet(options.depth).to(device)
  sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
  drops = [int(options.epochs * 0.8), int(options.epochs * 0.9)]
  schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, drops, 0.01)
  for _ in range(options.epochs):
    net.train()
    for images, labels in training:
      sgd.zero_grad(set_to_none=True)
      logits = net(images.to(device, non_blocking=True))
      loss = functional.cross_entropy(logits, labels.to(device, non_blocking=True))
      loss.backward()
      sgd.step()
    schedule.step()
    found = accuracy(net, testing, device)
  seconds = time.perf_counter() - began
  print(f'{seconds} {found} torch {torch.__version__} {device}', flush=True)


if __name__ == '__main__':
  main()
