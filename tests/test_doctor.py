"""The doctor finds each planted fault, and none in a healthy run."""

import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from lt_jax import doctor, evaluate, files, footprint, prepare, run, writers
from lt_jax.errors import UserError
from lt_jax.screen import Screen
from tests import child, mini, tiny

COUNTS = (6, 3, 1, 1)
"""One class is many-shot, one medium-shot, two few-shot, by the bounds in `tiny`."""


def arrays(seed=0):
  """Returns the members of a healthy .npz."""
  generator = np.random.default_rng(seed)
  made, pattern = {}, generator.integers(0, 128, (len(COUNTS), 8, 8, 1), np.uint8)
  for split, counts in {'train': np.add(COUNTS, tiny.META), 'test': [2] * 4}.items():
    label = np.repeat(np.arange(len(COUNTS)), counts)
    noise = generator.integers(0, 128, (len(label), 8, 8, 1), np.uint8)
    made |= {f'x_{split}': pattern[label] + noise, f'y_{split}': label}
  return made


@pytest.fixture
def config(tmp_path):
  """Returns a function (arrays) -> resolved config; arrays are healthy by default."""

  def write(members=None, **overrides):
    path = tmp_path / 'data.npz'
    np.savez(path, **(members or arrays()))
    made = tiny.config(path, 'ce', **overrides)
    made['data'] |= {'mean': [0.5], 'std': [0.2]}
    return made

  return write


@pytest.fixture
def listed(tmp_path, rng):
  """Returns (config, folder) of listed photographs, twelve per split."""
  folder = tmp_path / 'lists'
  folder.mkdir()
  for split in ('train', 'test'):
    lines = []
    for i in range(12):
      label = i // 6 if split == 'train' and i < 9 else i % 3
      (folder / f'{split}_{i}.jpg').write_bytes(mini.photograph(rng, label))
      lines.append(f'{split}_{i}.jpg {label}\n')
    (folder / f'{split}.txt').write_text(''.join(lines))
  made = tiny.config(folder, 'ce')
  made['data'] |= {
    'source': f'list:{folder}',
    'meta_per_class': 0,
    'image_size': 8,
    'resize': 8,
    'mean': [0.57, 0.39, 0.21],
    'std': [0.35, 0.33, 0.2],
  }
  return made, folder


def examine(case, *checks):
  """Builds the config and returns the findings of some checks."""
  sections = {'open': (doctor.Case.open,), 'rest': checks}
  return [finding for _, finding in doctor.examine(case, sections)]


def text_of(found, level):
  return '\n'.join(finding.text for finding in found if finding.level == level)


def faults(found):
  """Returns all problems as one text."""
  return text_of(found, 'odd') + text_of(found, 'wrong')


def test_a_healthy_run_has_no_fault(config, tmp_path, monkeypatch):
  monkeypatch.setattr(doctor.machine, '_file_system', lambda path: 'ext4')
  workdir = tmp_path / 'deep' / 'run'
  found = list(doctor.examine(doctor.Case(config(), workdir)))
  bad = [(s, f) for s, f in found if f.level != 'ok' and s != 'machine']
  assert not bad
  assert 'train: an evaluation takes about' in text_of([f for _, f in found], 'ok')
  several = {'domains'}  # of which one says nothing
  assert {section for section, _ in found} == set(doctor.SECTIONS) - several
  assert [path.name for path in tmp_path.iterdir()] == ['data.npz']


def test_photographs_without_a_fault(listed):
  checks = [*doctor.SECTIONS['data'], *doctor.SECTIONS['images']]
  found = examine(doctor.Case(listed[0]), *checks)
  assert not faults(found)
  assert 'train: 12 files open, 12 were decoded' in text_of(found, 'ok')
  assert 'of 24 were hashed, because the others differ in size' in text_of(found, 'ok')


def test_skipped_images_are_reported_everywhere(listed, tmp_path, rng, capsys):
  made, _ = listed
  folder = tmp_path / 'set'
  for split in ('train', 'test', 'val'):
    for name in ('cat', 'dog'):
      (folder / split / name).mkdir(parents=True)
      for i in range(2):
        file = folder / split / name / f'{i}.jpg'
        file.write_bytes(mini.photograph(rng, i))
  (folder / 'train/cat/2.tif').touch()
  (folder / 'extra').mkdir()
  made['data'] |= {'source': f'folder:{folder}', 'test_split': 'val'}
  lines = [
    'train: 1 file passed over: train/cat/2.tif',
    'train: not used, next to the splits: extra/',
    "test: the split 'test' of the source is not used",
  ]
  found = examine(doctor.Case(made), doctor.data.splits)
  assert text_of(found, 'odd').splitlines() == lines
  case = doctor.Case(made)
  assert not text_of(list(case.open()), 'wrong')
  capsys.readouterr()
  run._banner(case.experiment, tmp_path, Screen(), [])
  banner = capsys.readouterr().out
  assert all(line in banner for line in lines)
  prepare.convert(f'folder:{folder}', name='pets', data_dir=str(tmp_path / 'records'))
  assert capsys.readouterr().out.splitlines()[:2] == lines[:2]


def test_a_classifier_that_is_retrained_for_few_steps(config, tmp_path, capsys):
  made = tiny.config(tmp_path / 'data.npz', 'crt')
  config()  # writes the images
  made['epochs'], made['stages']['classifier']['epochs'] = 2.0, 2.0
  case = doctor.Case(made)
  found = text_of(list(case.open()), 'odd')
  assert "stage 'classifier' trains for only 2 steps, too few" in found
  assert 'raise config.stages.classifier.epochs' in found
  run._banner(case.experiment, tmp_path, Screen(), [])
  assert f'warning: {found}' in capsys.readouterr().out


def test_an_image_in_training_and_test(config):
  members = arrays()
  members['x_test'][0] = members['x_train'][1]
  found = examine(doctor.Case(config(members)), doctor.duplicates)
  assert 'images in train and in test: 1, such as' in text_of(found, 'wrong')
  assert '(train)' in text_of(found, 'wrong') and '(test)' in text_of(found, 'wrong')


def test_an_image_twice_with_two_labels(config):
  members = arrays()
  members['x_train'][:] = np.arange(len(members['x_train']))[:, None, None, None]
  members['x_train'][-1] = members['x_train'][0]
  data = config(members)
  data['data'] |= {'meta_per_class': 0}
  found = examine(doctor.Case(data), doctor.duplicates)
  assert 'images more than once in train: 1, such as' in text_of(found, 'odd')
  assert "two labels: 1, such as #0 (train): '0' = #18 (train): '3'" in faults(found)


def test_few_that_are_twice_are_odd(config, monkeypatch):
  monkeypatch.setattr(doctor.data, 'TOLERATED', 0.5)
  members = arrays()
  members['x_test'][0] = members['x_train'][0]
  found = examine(doctor.Case(config(members)), doctor.duplicates)
  assert 'in test' in text_of(found, 'odd') and not text_of(found, 'wrong')


def test_the_same_file_under_two_names(listed):
  config, folder = listed
  shutil.copy(folder / 'train_0.jpg', folder / 'test_7.jpg')
  found = examine(doctor.Case(config), doctor.duplicates)
  for name in ('train_0.jpg (train)', 'test_7.jpg (test)', "'0'", "'1'"):
    assert name in text_of(found, 'wrong')


def test_a_truncated_file_is_found_by_its_end(listed, monkeypatch):
  config, folder = listed
  monkeypatch.setattr(doctor.case, 'SAMPLE', 0)
  whole = (folder / 'test_3.jpg').read_bytes()
  (folder / 'test_3.jpg').write_bytes(whole[: len(whole) // 2])
  found = examine(doctor.Case(config), doctor.readable)
  assert 'test: images that cannot be read: 1, such as' in text_of(found, 'wrong')
  assert 'test_3.jpg' in text_of(found, 'wrong')


def test_damage_inside_is_found_when_all_is_decoded(listed, monkeypatch):
  config, folder = listed
  monkeypatch.setattr(doctor.case, 'SAMPLE', 0)
  whole = (folder / 'train_5.jpg').read_bytes()
  (folder / 'train_5.jpg').write_bytes(whole[: len(whole) // 2] + whole[-2:])
  assert not faults(examine(doctor.Case(config), doctor.readable))
  thorough = doctor.Case(config, thorough=True)
  assert 'train_5.jpg' in text_of(examine(thorough, doctor.readable), 'wrong')
  config['data']['on_bad_image'] = 'skip'
  thorough = doctor.Case(config, thorough=True)
  found = examine(thorough, doctor.readable)
  assert 'train_5.jpg' in text_of(found, 'odd') and not text_of(found, 'wrong')
  (folder / 'train_6.jpg').write_bytes(whole[:9])  # two are too many to replace
  found = examine(thorough, doctor.readable)
  assert 'train: images that cannot be read: 2' in text_of(found, 'wrong')


def test_a_bad_test_image_is_reported_and_counted(listed, tmp_path):
  """As for training images, another image of its class replaces it."""
  config, folder = listed
  path = folder / 'test_3.jpg'
  path.write_bytes(path.read_bytes()[:300])
  with pytest.raises(UserError, match='test_3.jpg: a damaged image'):
    run.run(config, tmp_path / 'strict')
  config['data']['on_bad_image'], config['epochs'] = 'skip', 4.0
  result = run.run(config, tmp_path / 'run')
  assert result['stand_ins'] == {'test': 1}
  rows = writers.read_rows(tmp_path / 'run' / 'events.jsonl')
  bad = [(r['split'], r['image']) for r in rows if r['event'] == 'bad_image']
  assert bad == [('test', str(path))]
  evaluated = evaluate.evaluate(files.absolute(tmp_path / 'run'))
  assert evaluated['test']['accuracy'] == result['test']['accuracy']
  (folder / 'test_4.jpg').write_bytes(b'')
  message = '2 images of test cannot be read, but at most 1 of 12 may be replaced'
  with pytest.raises(UserError, match=message):
    run.run(config, tmp_path / 'two')


def test_images_that_exif_would_turn(listed):
  config, folder = listed
  exif = Image.Exif()
  exif[0x0112] = 6
  for name in ('train_2', 'train_5', 'test_1'):
    with Image.open(folder / f'{name}.jpg') as image:
      image.save(folder / f'{name}.jpg', exif=exif)
  found = text_of(examine(doctor.Case(config), doctor.readable), 'odd')
  line = 'images with an EXIF orientation, which is not applied'
  assert f'train: {line}: 2, such as {folder}/train_2.jpg' in found
  assert f'test: {line}: 1, such as {folder}/test_1.jpg' in found


def test_a_missing_file_and_what_is_skipped_for_it(listed):
  config, folder = listed
  (folder / 'train_2.jpg').unlink()
  found = examine(doctor.Case(config), doctor.duplicates, doctor.compiles)
  assert 'lacks 1 of the listed images: train_2.jpg' in text_of(found, 'wrong')
  assert [finding.level for finding in found] == ['wrong', 'skip', 'skip']
  assert 'duplicates: the data cannot be opened' in text_of(found, 'skip')


def test_a_label_out_of_range(config):
  members = arrays()
  members['y_test'][3] = 4
  found = examine(doctor.Case(config(members)))
  assert 'y_test: label 4 at index 3 is not in [0, 4)' in text_of(found, 'wrong')
  assert len(found) == 1


def test_the_data_are_looked_at_where_nothing_else_can_be_built(config):
  config = config(optimizer={'name': 'sgdd'})
  found = examine(doctor.Case(config), doctor.splits, doctor.compiles)
  assert 'sgd' in text_of(found, 'wrong')
  assert 'test: 8 images' in text_of(found, 'ok')
  assert 'compiles: the config cannot be built' in text_of(found, 'skip')


@pytest.mark.parametrize('name, value', [('mean', 0.9), ('std', 1.0)])
def test_another_normalisation(config, name, value):
  config = config()
  config['data'][name] = [value]
  found = examine(doctor.Case(config), doctor.normalisation)
  text = text_of(found, 'odd')
  assert f'see data.mean {config["data"]["mean"][0]}' in text
  assert 'the mean is far from 0' in text or name == 'std'
  assert 'the deviation is far from 1' in text or name == 'mean'


def test_blank_images(config):
  members = arrays()
  members['x_train'][:] = 7
  found = examine(doctor.Case(config(members)), doctor.constant)
  assert 'images of one colour: 11 of 11' in text_of(found, 'wrong')


def test_classes_and_their_counts(config):
  members = arrays() | {'class_names': np.array(['a', 'b', 'a', 'c'])}
  members['y_test'][:] = [0, 0, 0, 0, 0, 1, 2, 2]
  checks = doctor.classes, doctor.tail, doctor.shots, doctor.balanced_test
  config = config(members)
  config['data'] |= {'many_shot': 9}
  found = text_of(examine(doctor.Case(config), *checks), 'odd')
  assert "names shared by two classes: 1, such as 'a'" in found
  assert "classes without images in test: 1, such as 'c'" in found
  assert 'no class is many-shot' in found
  assert 'test has 1 to 5 images per class' in found


def test_a_tail_that_is_not_as_stated(config):
  config = config()
  config['data'] |= {'profile': 'exponential', 'n_max': 6, 'imbalance': 6}
  case = doctor.Case(config)
  assert 'are those of data.profile' in text_of(examine(case, doctor.tail), 'ok')
  config['data']['imbalance'] = 2  # which the images were not drawn for
  (_, stated) = [finding for _, finding in doctor.examine(case, {'': (doctor.tail,)})]
  assert stated.level == 'odd' and 'states 4 images of class 1' in stated.text


@pytest.mark.parametrize(
  ('counts', 'shape'),
  [
    ([100, 46, 22, 10, 5], 'exponential'),
    ([50, 50, 5, 5], 'a step'),
    ([50, 50, 49, 49], 'balanced'),
    ([100, 99, 98, 97, 1], 'neither'),
  ],
)
def test_shapes_of_a_tail(counts, shape):
  assert doctor.data._shape(np.array(counts)).startswith(shape)


def test_the_gini_coefficient_is_the_mean_difference(rng):
  counts = rng.integers(1, 100, 20)
  mean_difference = np.abs(counts[:, None] - counts[None]).mean()
  np.testing.assert_allclose(
    doctor.data._gini(counts), mean_difference / (2 * counts.mean()), rtol=1e-12
  )


STEP = doctor.compiles, doctor.one_step, doctor.loss_at_start, doctor.learns


def test_a_learning_rate_that_is_too_great(config):
  config = config(schedule={'name': 'constant', 'base': 1e30})
  found = examine(doctor.Case(config), *STEP, doctor.by_heart)
  assert 'not finite: try a smaller schedule.base' in text_of(found, 'wrong')


def test_a_batch_that_is_not_learned_by_heart(config, monkeypatch):
  monkeypatch.setattr(doctor.step, 'BY_HEART', 2)
  config = config(schedule={'name': 'constant', 'base': 1e-6})
  case = doctor.Case(config)
  found = examine(case, *STEP, doctor.by_heart)
  assert 'more than half' in text_of(found, 'odd')
  monkeypatch.setattr(doctor.step, 'BY_HEART', 1000)
  monkeypatch.setattr(doctor.step, 'BUDGET', 0.01)
  found = [f for _, f in doctor.examine(case, {'': (doctor.by_heart,)})]
  assert 'there was no time for more' in text_of(found, 'skip')


def test_every_stage_makes_a_step(config, tmp_path):
  config = tiny.config(tmp_path / 'data.npz', 'meta_ce') | {'data': config()['data']}
  case = doctor.Case(config)
  found = examine(case, *STEP, doctor.by_heart, doctor.memory, doctor.decoding)
  assert not text_of(found, 'wrong')
  assert set(case.steps) == set(config['stage_order'])


def test_a_gradient_that_does_not_arrive(config):
  config = config(optimizer={'name': 'sgd', 'weight_decay': [['.*', 1e-4]]})
  case = doctor.Case(config)
  examine(case)
  stage = case.experiment.stages['train']

  def step(state, batches):
    blank = {**batches['train'], 'image': 0 * batches['train']['image']}
    blank['label'] = 0 * blank['label']
    return stage.method.step(state, {'train': blank})

  blind = stage._replace(method=stage.method._replace(step=step))
  case.experiment.stages['train'] = blind
  found = [finding for _, finding in doctor.examine(case, {'': STEP})]
  assert 'the same way for other images: no gradient arrives' in text_of(found, 'wrong')


def test_nothing_moves_without_a_learning_rate(config):
  found = examine(doctor.Case(config(schedule={'name': 'constant', 'base': 0})), *STEP)
  assert 'no parameter changes' in text_of(found, 'wrong')
  assert 'that of guessing' in text_of(found, 'ok')


def trial(case, **values):
  """Returns a trial of the first stage, without compiling."""
  examine(case)
  fields = dict.fromkeys(doctor.case.Trial._fields) | values
  return doctor.case.Trial(**fields)._replace(stage=case.experiment.stages['train'])


def test_memory_and_space(config, tmp_path, monkeypatch):
  case = doctor.Case(config(), tmp_path)
  case.trials['train'] = trial(case, memory={'parameters': 2e6, 'batch': 1e6})
  found = examine(case, doctor.memory, doctor.space)
  assert not faults(found) and 'per device) for parameters' in text_of(found, 'ok')
  monkeypatch.setattr(footprint, 'free_memory', lambda device: 1000.0)
  free = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(doctor.machine.shutil, 'disk_usage', lambda path: free)
  found = text_of(examine(case, doctor.memory, doctor.space), 'wrong')
  assert '0.00 MB are available' in found and '0.00 MB are free' in found


def test_images_that_are_decoded_too_slowly(listed):
  case = doctor.Case(listed[0])
  case.trials['train'] = trial(case)
  for seconds, level in ((1e-9, 'odd'), (1e3, 'ok')):
    case.steps['train'] = doctor.case.Step(1.0, True, {}, False, seconds)
    (_, found) = examine(case, doctor.decoding)  # after the output of building
    assert found.level == level and 'images/s can be decoded' in found.text


@pytest.mark.skipif(not os.path.isdir('/dev/shm'), reason='no /dev/shm')
def test_shared_memory_for_the_workers(listed, monkeypatch):
  config = listed[0]
  config['data']['workers'] = 2
  case = doctor.Case(config)
  for free, level in ((10**9, 'ok'), (10**3, 'odd')):
    usage = shutil.disk_usage('/')._replace(free=free)
    monkeypatch.setattr(doctor.machine.shutil, 'disk_usage', lambda path, u=usage: u)
    (_, found) = examine(case, doctor.shared_memory)
    assert found.level == level and 'in /dev/shm' in found.text


def test_a_folder_that_cannot_be_written(config, tmp_path):
  (tmp_path / 'file').write_text('')
  found = examine(doctor.Case(config(), tmp_path / 'file' / 'run'), doctor.writable)
  assert 'cannot be written: Not a directory' in text_of(found, 'wrong')


def test_folders_on_other_file_systems(config, tmp_path, monkeypatch):
  case = doctor.Case(config(), tmp_path)
  for kind, text in (('tmpfs', 'in memory'), ('fuse.s3fs', 'on a network')):
    monkeypatch.setattr(doctor.machine, '_file_system', lambda path, kind=kind: kind)
    assert text in text_of(examine(case, doctor.file_system), 'odd')


def test_a_folder_with_another_run_in_it(config, tmp_path):
  config = config()
  case = doctor.Case(config, tmp_path)
  files.write_json(tmp_path / 'config.json', config)
  assert 'which will resume' in text_of(examine(case, doctor.begun), 'ok')
  files.write_json(tmp_path / 'config.json', config | {'seed': 7})
  with files.locked(tmp_path):
    found = text_of(examine(case, doctor.begun), 'wrong')
  assert 'in use by a run' in found and 'seed was 7 and is 0' in found


def test_generated_images_are_not_looked_at(config):
  config = config()
  config['data'] |= {'source': 'fake', 'meta_per_class': 0}
  checks = [*doctor.SECTIONS['data'], *doctor.SECTIONS['images']]
  found = examine(doctor.Case(config), *checks)
  assert 'duplicates: the images are generated' in text_of(found, 'skip')


def test_exit_codes(tmp_path):
  output = tmp_path / 'output'
  arguments = [
    f'--config={child.ROOT}/configs/digits_lt.py:ce',
    f'--workdir={tmp_path}/run',
    '--config.model.trunk=tiny_cnn',
  ]
  assert child.run(arguments, output, module='lt_jax.doctor.__main__') == 0
  assert 'found 0 wrong' in output.read_text()
  arguments.append('--config.data.known_classes=11')
  assert child.run(arguments, output, module='lt_jax.doctor.__main__') == 2
  text = output.read_text()
  assert '  wrong  data.known_classes is 11' in text
  assert text.splitlines()[-1].startswith('found 1 wrong') and 'error' not in text
  (skipped,) = (line for line in text.splitlines() if 'the config cannot be' in line)
  assert re.fullmatch(r'  skip   \d+ checks: the config cannot be built', skipped)
