"""Where data lie: from any folder, and after they moved."""

import json

import pytest
from etils import epath

from lt_jax import build, evaluate, provenance, run
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
  assert found == {'source': f'npz:{tmp_path}/tiny.npz', 'dir': '', 'domains': {}}
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  monkeypatch.chdir(elsewhere)
  place = {'source': f'npz:{tmp_path}/tiny.npz', 'dir': ''}
  for recorded, data_dir in ((found, None), (None, f'{tmp_path}/tiny.npz')):
    now = provenance.located(config, recorded, data_dir)
    assert now == {**config, 'data': config['data'] | place}
  (tmp_path / 'tiny.npz').rename('moved.npz')
  for recorded in (found, None, {'source': 5}):
    with pytest.raises(UserError, match=r'not where they were, .*tiny.npz: give --da'):
      provenance.located(config, recorded)
  there = build.build(provenance.located(config, found, 'moved.npz'))
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


def test_data_without_files_have_not_moved():
  with pytest.raises(UserError, match="--data_dir: the source 'digits' has no files"):
    places.moved({'source': 'digits', 'dir': ''}, '/new')


def test_errors_in_moved_data_name_them():
  message = 'data.mean is (0.5, 0.5, 0.5); it must be one number'
  for given, whole in (('/new', f'--data_dir=/new: {message}'), (None, message)):
    with pytest.raises(UserError) as error, evaluate._naming(given):
      raise UserError(message)
    assert str(error.value) == whole


def test_a_bucket_is_where_it_is():
  data = {'source': 'tfds:cifar10', 'dir': 'gs://bucket/data'}
  assert places.place(data) == data and not places.gone(data)


def test_domains_are_found_where_they_lie(tmp_path, monkeypatch):
  """Each is recorded, and each may move; others follow `data`."""
  monkeypatch.chdir(tmp_path)
  for name in ('a.npz', 'b.npz'):
    (tmp_path / name).touch()
  config = {
    **tiny.config('a.npz', 'ce'),
    'domains': {'other': {'source': 'npz:b.npz'}, 'same': {'known_classes': 3}},
  }
  found = provenance.found(config)
  of_other = {'other': {'source': f'npz:{tmp_path}/b.npz', 'dir': ''}}
  assert found['domains'] == of_other
  monkeypatch.chdir('/')
  now = provenance.located(config, found)
  assert now['data']['source'] == f'npz:{tmp_path}/a.npz'
  assert now['domains'] == {'same': {'known_classes': 3}, **of_other}
  (tmp_path / 'b.npz').rename(tmp_path / 'c.npz')
  with pytest.raises(UserError, match='b.npz: give --data_dir=other=PATH'):
    provenance.located(config, found)
  now = provenance.located(config, found, f'other={tmp_path}/c.npz')
  assert now['data']['source'] == f'npz:{tmp_path}/a.npz'
  assert now['domains']['other']['source'] == f'npz:{tmp_path}/c.npz'
  with pytest.raises(UserError, match="unknown domain 'othr'; did you mean 'other'"):
    provenance.moved(config, 'othr=/x')


def test_a_run_resumes_after_its_data_moved(one_device, tmp_path, capsys):
  """Only with the same data, and in one line; nothing that was trained is lost."""
  tiny.write_npz(tmp_path / 'old.npz')
  config = tiny.config(f'{tmp_path}/old.npz', 'ce,epochs=2.0')
  workdir = epath.Path(tmp_path / 'run')
  before = run.run(config, workdir)
  (tmp_path / 'old.npz').rename(tmp_path / 'new.npz')
  message = f'data moved: was npz:{tmp_path}/old.npz, now npz:{tmp_path}/new.npz'
  assert message not in capsys.readouterr().out
  with pytest.raises(UserError, match=r'old.npz: give --data_dir=PATH'):
    evaluate.evaluate(workdir)
  now = provenance.moved(config, f'{tmp_path}/new.npz')
  assert not provenance.changes(config, now)
  assert provenance.changes(config, now, same_place=True)  # which a sweep looks at
  for _ in range(2):
    assert run.run(now, workdir)['state_sha256'] == before['state_sha256']
  assert capsys.readouterr().out.count(message) == 1
  found = json.loads((workdir / 'data.json').read_text())['found']
  assert found['source'] == f'npz:{tmp_path}/new.npz'
  evaluate.evaluate(workdir)
  tiny.write_npz(tmp_path / 'other.npz', seed=1)
  with pytest.raises(UserError, match='the data have changed since'):
    run.run(provenance.moved(config, f'{tmp_path}/other.npz'), workdir)
  (workdir / 'data.json').unlink()
  with pytest.raises(UserError, match='were trained on other data'):
    run.run(provenance.moved(config, f'{tmp_path}/other.npz'), workdir)
  with pytest.raises(run.OtherConfig, match="data.source was 'npz:"):
    run.run({**now, 'data': {**now['data'], 'source': 'digits'}}, workdir)
