"""Predictions for image files, from the run's folder alone."""

import csv
import io
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from configs import digits_lt
from lt_jax import (
  build,
  checkpoint,
  files,
  predict,
  results,
  run,
  train,
  trained,
)
from lt_jax.config import resolve
from lt_jax.errors import UserError
from tests import child, tiny


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
  """Returns (run, folder of its test images); the run has moved since training."""
  folder = tmp_path_factory.mktemp('digits')
  command = child.command(folder / 'run', config='digits_lt.py:ce,epochs=20')
  log = folder / 'log'
  assert child.run(command, log) == 0, log.read_text()
  workdir = epath.Path(shutil.move(folder / 'run', folder / 'moved'))
  split = build.build(trained.read_config(workdir)).dataset.tests['test']
  (folder / 'images').mkdir()
  for place, row in enumerate(split.rows):
    image = Image.fromarray(split.image(row)[..., 0])
    image.save(folder / 'images' / f'{place:03d}.png')
  return workdir, folder / 'images'


def leave(config, workdir, change=lambda state: state):
  """Writes the folder of a run without training; returns its test images.

  It has two checkpoints of the same State; step 0 is the selected one.
  """
  workdir.mkdir()
  experiment = build.build(config, devices=1)
  stage = list(experiment.stages.values())[-1]
  state = train.initial_state(
    stage.method, stage.streams, jax.random.key(0), experiment.mesh
  )
  state = change(state)
  ladder = checkpoint.Checkpoints(workdir / 'stages' / stage.name / 'checkpoints')
  ladder.save_best(0, state)
  ladder.save(1, state.replace(step=state.step + 1))
  ladder.close()
  test = results.evaluate(experiment, stage, state).records['test']
  np.savez(
    workdir / 'predictions.npz', logits=test['logits'], score=test['known_score']
  )
  files.write_json(workdir / 'config.json', config)
  files.write_json(workdir / 'data.json', run._data_facts(experiment, workdir))
  return experiment.dataset.tests['test']


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
  """Returns (run, folder of its test images) for photographs of many sizes."""
  folder = tmp_path_factory.mktemp('photographs')
  config = tiny.config('', 'ce', epochs=4.0, select='val/loss')
  fake = {'classes': 4, 'train': 16, 'largest': 7, 'smallest': 2, 'val': 8, 'test': 8}
  fake |= {'open': 0, 'image_size': 0}
  config['data'] |= {'source': 'fake', 'fake': fake, 'meta_per_class': 0}
  config['data'] |= {'image_size': 8, 'resize': 10, 'mean': [0.4, 0.5, 0.6]}
  workdir = epath.Path(folder / 'run')
  split = leave(config, workdir)
  (folder / 'images').mkdir()
  for place, row in enumerate(split.rows):
    (folder / 'images' / f'{place}.jpeg').write_bytes(split.source.encoded(row))
  return workdir, folder / 'images'


def table(path):
  with open(path, newline='') as file:
    return list(csv.DictReader(file))


def check_is_as_evaluated(rows, workdir):
  """The logits in predictions.npz are the same up to float16."""
  with np.load(workdir / 'predictions.npz') as stored:
    logits = stored['logits'].astype(np.float64)
  probability = np.exp(logits - logits.max(1, keepdims=True))
  probability /= probability.sum(1, keepdims=True)
  printed = np.array([[float(row[f'probability_{k}']) for k in (1, 2)] for row in rows])
  np.testing.assert_allclose(
    printed, np.sort(probability, 1)[:, :-3:-1], rtol=5e-3, atol=1e-3
  )
  picked = [probability[i, int(row['prediction'])] for i, row in enumerate(rows)]
  np.testing.assert_allclose(picked, printed[:, 0], rtol=5e-3, atol=1e-3)


def stamps(workdir):
  return {path: path.stat().st_mtime_ns for path in pathlib.Path(workdir).rglob('*')}


def test_they_are_those_of_the_run(digits, tmp_path, capsys):
  workdir, images = digits
  before = stamps(workdir)
  predict.predict(workdir, [str(images)], str(tmp_path / 'out.csv'), top=99)
  assert stamps(workdir) == before
  rows = table(tmp_path / 'out.csv')
  assert [row['path'] for row in rows] == sorted(map(str, images.iterdir()))
  assert [row['prediction'] for row in rows] == [row['class_1'] for row in rows]
  assert 'class_8' in rows[0] and 'class_9' not in rows[0]
  check_is_as_evaluated(rows, workdir)
  result = json.loads((workdir / 'result.json').read_text())
  threshold = result['test']['threshold']
  for row in rows:
    assert row['is_unknown'] == str(float(row['known_score']) < threshold)
  known = [
    row['is_unknown'] == 'False' and row['prediction'] == str(label)
    for row, label in zip(rows, labels(workdir), strict=True)
  ]
  assert np.mean(known) == pytest.approx(result['test']['known_accuracy'])
  printed = capsys.readouterr().out
  assert '400 predicted, 0 skipped' in printed and 'resized' not in printed
  assert 'normalised as' not in printed  # there is only one domain
  assert 'that the run chose; for another threshold, compare' in printed


def labels(workdir):
  with np.load(workdir / 'predictions.npz') as stored:
    return stored['label']


def fitted(state):
  """Gives OpenMax tails as if fitted; other methods do not change."""
  if 'openmax' not in state.memory:
    return state
  mean = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
  tails = {**state.memory['openmax'], 'mean': mean, 'fitted': jnp.ones(4, bool)}
  return state.replace(memory={'openmax': tails})


@pytest.mark.parametrize(
  'recipe', [pytest.param('oltr', marks=pytest.mark.slow), 'openmax']
)
def test_other_memory_of_a_method_counts(tmp_path, recipe):
  config = tiny.config(tiny.write_npz(tmp_path / 'tiny.npz', (8, 1, 1, 1)), recipe)
  workdir = epath.Path(tmp_path / 'run')
  split = leave(config, workdir, fitted)
  (tmp_path / 'tiny.npz').unlink()
  (tmp_path / 'images').mkdir()
  for place, row in enumerate(split.rows):
    image = Image.fromarray(split.image(row)[..., 0])
    image.save(tmp_path / 'images' / f'{place:02d}.png')
  predict.predict(workdir, [str(tmp_path / 'images')], str(tmp_path / 'out.csv'))
  rows = table(tmp_path / 'out.csv')
  check_is_as_evaluated(rows, workdir)
  with np.load(workdir / 'predictions.npz') as stored:
    score = stored['score']
  assert score.min() < 0.99
  scores = [float(row['known_score']) for row in rows]
  np.testing.assert_allclose(scores, score, rtol=1e-4)


@pytest.mark.parametrize(
  'recipe', ['ldam_drw', 'meta_ce', 'cb_finetune', 'fslwf', 'crt']
)
def test_a_network_is_built_without_the_data(recipe):
  """With streams and stages of every kind, data.json gives the same State."""
  config = resolve(digits_lt.get_config(recipe))
  experiment = build.build(config, devices=1)
  facts = run._data_facts(experiment, epath.Path('nowhere'))
  without = trained.build_without_data(config, json.loads(json.dumps(facts)))
  stage, expected = (list(e.stages.values())[-1] for e in (without, experiment))
  assert (stage.name, stage.select) == (expected.name, expected.select)
  shapes, others = (train.state_shapes(s.method, s.streams) for s in (stage, expected))
  assert jax.tree.structure(shapes) == jax.tree.structure(others)
  assert jax.tree.leaves(shapes) == jax.tree.leaves(others)


def test_photographs_are_cropped_as_in_the_evaluation(photographs, tmp_path):
  workdir, images = photographs
  predict.predict(workdir, [str(images)], str(tmp_path / 'out.csv'), top=2)
  rows = table(tmp_path / 'out.csv')
  assert len(rows) == 8 and 'is_unknown' not in rows[0]
  check_is_as_evaluated(rows, workdir)


def test_the_state_is_the_one_of_the_result(photographs):
  workdir, _ = photographs
  for which, step in ((None, 0), ('best', 0), ('last', 1)):
    network = trained.open_run(workdir, which)
    assert network.step == step == int(network.state.step) and network.verified


def test_a_threshold_holds_for_the_state_that_it_was_chosen_for(
  photographs, tmp_path, capsys
):
  """With another State, nothing can say which images are unknown."""
  workdir = epath.Path(shutil.copytree(photographs[0], tmp_path / 'run'))
  chosen = {'threshold': {'value': 0.5}}
  data = files.read_json(workdir / 'data.json')
  files.write_json(workdir / 'data.json', data | chosen)
  files.write_json(workdir / 'result.json', {'step': 0, **chosen})
  for which, threshold in ((None, 0.5), ('best', 0.5), ('last', None)):
    assert trained.open_run(workdir, which).threshold == threshold
    out = tmp_path / 'out.csv'
    predict.predict(workdir, [str(photographs[1])], str(out), which=which)
    assert ('is_unknown' in table(out)[0]) == (threshold is not None)
  warning = 'not decided: the threshold was chosen for step 0'
  assert capsys.readouterr().out.count(warning) == 1
  files.write_json(workdir / 'data.json', data | {'threshold': {'value': 0.9}})
  with pytest.raises(UserError, match='another threshold than result.json'):
    trained.open_run(workdir)


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('config.json', {'eval_batch': '8'}, "has an unexpected value for 'eval_batch'"),
    ('config.json', {'data': 5}, "has an unexpected value for 'data'"),
    ('config.json', {'stages': None}, "has an unexpected value for 'stages'"),
    ('data.json', {'class_names': 5}, "has an unexpected value for 'class_names'"),
    ('data.json', {'counts': {'train': [1], 'val': 5}}, "for 'counts'"),
    ('data.json', {'preprocessing': {'mean': [0.5]}}, "for 'preprocessing'"),
    ('data.json', {'threshold': {'value': 'high'}}, "for 'threshold'"),
    ('result.json', {'threshold': {'value': 0.5}}, "lacks 'step'"),
    ('result.json', {'step': 0, 'threshold': 5}, "for 'threshold'"),
  ],
)
def test_a_file_that_holds_something_else_is_named(
  photographs, tmp_path, name, change, message
):
  workdir = epath.Path(shutil.copytree(photographs[0], tmp_path / 'run'))
  path = workdir / name
  before = files.read_json(path) if path.exists() else {}
  files.write_json(path, before | change)
  with pytest.raises(UserError, match=f'^{path} .*{message}') as raised:
    trained.open_run(workdir)
  assert '\n' not in str(raised.value)


def flat(folder, name, size, mode='RGB'):
  colour = {'RGB': (90, 90, 90), 'L': 90, 'RGBA': (90, 90, 90, 7), 'I;16': 90 * 257}
  path = folder / name
  Image.new(mode, size, colour[mode]).save(path)
  return str(path)


def test_other_sizes_and_colours_become_those_of_the_network(digits, tmp_path, capsys):
  kinds = [((8, 8), 'L'), ((8, 8), 'RGB'), ((31, 9), 'RGBA'), ((3, 40), 'I;16')]
  images = [flat(tmp_path, f'{i}.png', *kind) for i, kind in enumerate(kinds)]
  predict.predict(digits[0], images, str(tmp_path / 'out.csv'))
  rows = table(tmp_path / 'out.csv')
  assert [row.pop('path') for row in rows] == images
  for row in rows[1:]:
    values = [float(row[key]) for key in ('confidence', 'known_score')]
    assert values == pytest.approx(
      [float(rows[0][key]) for key in ('confidence', 'known_score')], rel=1e-4
    )
  printed = capsys.readouterr().out
  assert printed.count('2 of 4 images were resized to 8 x 8 pixels, grey') == 1


def test_a_reduced_image_is_smoothed_before(photographs, tmp_path):
  """Thin stripes become grey, not whatever pixels the grid happens to hit."""
  workdir, _ = photographs
  network = trained.open_run(workdir)
  facts = {**network.facts, 'preprocessing': {'image_size': 0, 'resize': 0}}
  stripes = np.zeros((64, 64, 3), np.uint8)
  stripes[:, ::2] = 200
  Image.fromarray(stripes).save(tmp_path / 'stripes.png')
  path = [str(tmp_path / 'stripes.png')]
  found = predict.Pictures(path, network._replace(facts=facts), False)[0]
  assert found.shape == (8, 8, 3) and abs(found.astype(int) - 100).max() <= 4


@pytest.fixture
def some_bad(tmp_path):
  """Seven images, three of which cannot be read."""
  folder = tmp_path / 'some'
  folder.mkdir()
  for name in 'aceg':
    flat(folder, f'{name}.png', (8, 8))
  (folder / 'b.png').write_bytes((folder / 'a.png').read_bytes()[:40])
  (folder / 'd.jpg').write_bytes(b'')
  (folder / 'f.png').write_text('this is no image')
  return folder


def test_bad_images_are_left_out_on_request(digits, some_bad, tmp_path, capsys):
  out = str(tmp_path / 'out.csv')
  count = predict.predict(digits[0], [str(some_bad)], out, on_bad_image='skip')
  printed = capsys.readouterr().out
  assert count == 4 and '4 predicted, 3 skipped' in printed
  assert (
    printed.count('skipped: ') == 3
    and f'skipped: {some_bad}/d.jpg: the file' in printed
  )
  rows = table(out)
  assert [pathlib.Path(row['path']).stem for row in rows] == list('aceg')
  assert len({row['confidence'] for row in rows}) == 1
  bad = [str(some_bad / name) for name in ('b.png', 'f.png')]
  with pytest.raises(UserError, match='no image could be read; the first: .*b.png'):
    predict.predict(digits[0], bad, out, on_bad_image='skip')
  with pytest.raises(UserError, match='b.png: .*--on_bad_image=skip leaves it out'):
    predict.predict(digits[0], bad, out)


def test_the_command_refuses_a_bad_image_in_one_line(digits, some_bad, tmp_path):
  out = tmp_path / 'out.csv'
  out.write_text('as it was')
  given = [f'--workdir={digits[0]}', str(some_bad / 'a.png'), str(some_bad)]
  log = tmp_path / 'log'
  assert child.run([*given, '--out', str(out)], log, module='lt_jax.predict') == 2
  assert out.read_text() == 'as it was'
  *_, last = lines = log.read_text().splitlines()
  assert last.startswith(f'error: {some_bad}/b.png: ')
  assert sum('error' in line for line in lines) == 1
  assert {path.name for path in tmp_path.iterdir()} == {'some', 'out.csv', 'log'}


def test_files_of_folders_that_are_passed_over_are_counted(digits, tmp_path, capsys):
  folder = tmp_path / 'some'
  folder.mkdir()
  for name in ('a.png', 'b.gif', 'c.tif'):
    flat(folder, name, (8, 8))
  assert predict.predict(digits[0], [str(folder)], str(tmp_path / 'out.csv')) == 1
  assert '2 files passed over: ' in capsys.readouterr().out


def test_meaning_of_arguments(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('b/2.JPG', 'b/1.png', 'b/c/3.webp', 'b/.h/4.png', 'b/.5.png', 'b/x.txt'):
    pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(name).touch()
  below = ['b/1.png', 'b/2.JPG', 'b/c/3.webp']
  passed_over = []
  assert list(predict.expand('b', passed_over)) == below
  assert passed_over == ['b/x.txt']
  assert list(predict.expand('b/x.txt', [])) == ['b/x.txt']  # whatever its extension
  pathlib.Path('list').write_text('\ufeffb/2.JPG\n\n  b\nabsent.png\n')
  assert list(predict.expand('@list', [])) == ['b/2.JPG', *below, 'absent.png']
  (tmp_path / 'empty').mkdir()
  for name, message in {
    'empty': 'has no images',
    'absent.png': 'no file or folder absent.png',
    '@absent': 'the list absent cannot be read: No such file',
  }.items():
    with pytest.raises(UserError, match=message):
      list(predict.expand(name, []))


def test_mistakes_are_reported_before_anything_is_read(digits, tmp_path):
  workdir, images = digits
  for given, message in (
    ({'workdir': epath.Path(tmp_path)}, 'is not a run'),
    ({'images': []}, 'no images are given'),
    ({'top': 0}, '--top is 0'),
    ({'out': str(tmp_path / 'no' / 'x.csv')}, 'in a folder that does not exist'),
    ({'out': str(tmp_path)}, 'which exists but is not a regular file'),
    ({'which': 'best'}, 'has no best checkpoint of stage'),
    ({'on_bad_image': 'skp'}, "did you mean 'skip'"),
  ):
    right = {
      'workdir': workdir,
      'images': [str(images)],
      'out': str(tmp_path / 'x.csv'),
    }
    with pytest.raises(UserError, match=message):
      predict.predict(**(right | given))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('out', ['one.png', 'list', 'same.png', 'link.csv', 'lost'])
def test_files_that_are_read_or_linked_are_not_replaced(tmp_path, monkeypatch, out):
  """Under any name, and before the run is opened."""
  monkeypatch.chdir(tmp_path)
  flat(tmp_path, 'one.png', (8, 8))
  pathlib.Path('list').write_text('absent.png\n')
  pathlib.Path('table.csv').touch()
  for link, target in (('link.csv', 'table.csv'), ('lost', 'nowhere')):
    os.symlink(target, link)
  os.link('one.png', 'same.png')
  with pytest.raises(
    UserError, match=f'--out.*{out}.*(is one of|which exists)'
  ) as raised:
    predict.predict(epath.Path('run'), ['one.png', '@list'], out)
  assert ('not a regular file' in str(raised.value)) == (out in ('link.csv', 'lost'))


def test_no_file_of_a_run_is_replaced(digits, tmp_path):
  workdir, _ = digits
  inside = [path for path in pathlib.Path(workdir).rglob('*') if path.is_file()]
  assert {'config.json', 'result.json', 'best.json', '0.json'} & {
    p.name for p in inside
  }
  (tmp_path / 'link').symlink_to(workdir)
  named = ('evaluation.json', 'report.html', 'metrics.jsonl.damaged', 'stages/a.csv')
  for path in (*inside, *map(pathlib.Path(workdir).joinpath, named)):
    with pytest.raises(UserError, match='--out is .*, the place of a file of the run'):
      files.check_out(path)
  with pytest.raises(UserError, match='the place of a file of the run'):
    files.check_out(tmp_path / 'link' / 'config.json')
  for name in ('found.csv', 'predictions.csv', 'net.stablehlo.json'):
    files.check_out(workdir / name)
  files.check_out(tmp_path / 'result.json')


@pytest.mark.parametrize('channels', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_networks_of_other_channels(tmp_path, capsys, channels):
  path = tiny.write_npz(tmp_path / 'tiny.npz', (9, 9, 9, 9))
  with np.load(path) as stored:
    members = {
      name: np.concatenate([stored[name] // (i + 1) for i in range(channels)], axis=-1)
      if name.startswith('x')
      else stored[name]
      for name in stored
    }
  np.savez(path, **members)
  split = leave(tiny.config(path, 'ce'), epath.Path(tmp_path / 'run'))
  image = split.image(split.rows[0])
  for name, mode in (('all.png', 'RGBA'), ('grey.png', 'L')):
    pixels = image if mode == 'RGBA' and channels == 4 else image[..., 0]
    Image.fromarray(pixels).save(tmp_path / name)
  arguments = epath.Path(tmp_path / 'run'), [str(tmp_path / 'all.png')]
  out = str(tmp_path / 'found.csv')
  if channels == 2:
    for answer in ('raise', 'skip'):
      with pytest.raises(UserError, match='images with 2 channels'):
        predict.predict(*arguments, out, on_bad_image=answer)
    return
  paths = [*arguments[1], str(tmp_path / 'grey.png')]
  assert predict.predict(arguments[0], paths, out) == 2
  with open(out) as file:
    row, opaque = csv.DictReader(file)
  with np.load(tmp_path / 'run' / 'predictions.npz') as stored:
    score = stored['score'][0]
  assert float(row['known_score']) == pytest.approx(float(score), rel=1e-4)
  assert opaque['known_score'] != row['known_score']


def test_only_regular_files_are_images(digits, tmp_path):
  """Opening a pipe would wait for a writer."""
  folder = tmp_path / 'some'
  folder.mkdir()
  pipe, image = str(folder / 'b.png'), flat(folder, 'a.png', (8, 8))
  os.mkfifo(pipe)
  passed_over = []
  assert list(predict.expand(str(folder), passed_over)) == [image]
  assert passed_over == [pipe]
  with pytest.raises(UserError, match='b.png is not a regular file'):
    list(predict.expand(pipe, []))
  (tmp_path / 'list').write_text(pipe)
  with pytest.raises(UserError, match='b.png: not a regular file'):
    predict.predict(digits[0], [f'@{tmp_path}/list'], str(tmp_path / 'out.csv'))


def test_names_that_are_not_text_stay_unchanged(digits, tmp_path):
  path = os.fsdecode(os.fsencode(tmp_path) + b'/a,"\xff\n.png')
  pathlib.Path(path).write_bytes(next(digits[1].iterdir()).read_bytes())
  predict.predict(digits[0], [path], str(tmp_path / 'out.csv'))
  text = (tmp_path / 'out.csv').read_bytes().decode(errors='surrogateescape')
  (row,) = csv.DictReader(io.StringIO(text))
  assert row['path'] == path
