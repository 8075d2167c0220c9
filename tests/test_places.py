"""Where data lie: from any folder, and after they moved."""

import pytest

from lt_jax import build, evaluate, run
from lt_jax.config import config_digest
from lt_jax.data import places
from lt_jax.errors import UserError
from tests import tiny


def test_data_are_found_from_any_folder(tmp_path, monkeypatch):
  """config.json keeps the path as given; data.json has where that was."""
  monkeypatch.chdir(tmp_path)
  tiny.write_npz('tiny.npz')
  config = tiny.config('tiny.npz', 'ce')
  experiment = build.build(config)
  found = run._data_facts(experiment, tmp_path)['found']
  assert experiment.config['data']['source'] == 'npz:tiny.npz'
  assert found == {'source': f'npz:{tmp_path}/tiny.npz', 'dir': ''}
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  monkeypatch.chdir(elsewhere)
  assert evaluate.place(config['data'], found, None) == found
  assert evaluate.place(config['data'], None, None) == {
    'source': f'npz:{elsewhere}/tiny.npz',
    'dir': '',
  }
  (tmp_path / 'tiny.npz').rename('moved.npz')
  now = evaluate.place(config['data'], found, 'moved.npz')
  there = build.build({**config, 'data': config['data'] | now})
  assert there.dataset.fingerprint == experiment.dataset.fingerprint
  assert config_digest(config) == config_digest(experiment.config)


@pytest.mark.parametrize(
  ('source', 'dir', 'expected'),
  [
    ('folder:images', '', ('folder:/new', '')),
    ('npz:x.npz', '', ('npz:/new', '')),
    ('tfds:cifar10', '/old', ('tfds:cifar10', '/new')),
    ('list:gone', '', ('list:/new', '/new')),
    ('list:gone', '/old', ('list:/new', '/new')),
    ('list:/', '/old', ('list:/', '/new')),
  ],
)
def test_data_that_moved(source, dir, expected):
  found = places.moved({'source': source, 'dir': dir}, '/new')
  assert (found['source'], found['dir']) == expected


def test_what_has_no_files_has_not_moved():
  with pytest.raises(UserError, match="--data_dir: the source 'digits' has no files"):
    places.moved({'source': 'digits', 'dir': ''}, '/new')


def test_a_bucket_is_where_it_is():
  data = {'source': 'tfds:cifar10', 'dir': 'gs://bucket/data'}
  assert places.place(data) == data and places.is_there(data)
