"""Domains and streams: who may see which data, and the results."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import digits_domains
from lt_jax import build, run, sharding, train, trained
from lt_jax.cautions import cautions
from lt_jax.config import check_set_domains, resolve
from lt_jax.data.domains import shared
from lt_jax.data.lists import Files
from lt_jax.data.streams import Split, Unlabelled
from lt_jax.errors import UserError
from lt_jax.evals.collect import collector
from lt_jax.methods import METHODS
from lt_jax.pretrained import ours
from lt_jax.recipes import RECIPES
from lt_jax.report import runs
from lt_jax.results import uses_target_labels
from lt_jax.writers import read_rows

pytestmark = pytest.mark.usefixtures('one_device')

ADAPT = [
  pytest.param(name, marks=[pytest.mark.slow] * name.startswith('ocda_'))
  for name, recipe in RECIPES.items()
  if recipe.needs == ('target',)
]
NETS = {'dan': 'mnist_dann'}
"""Recipes that compare layers LeNet does not have."""

LABELLED = (
  'target_only',
  'sa_oracle',
  *(f'finetune_target_{images}' for images in (1, 5, 10)),
)


def config(recipe, options='epochs=1.0', **changes):
  made = digits_domains.get_config(f'{recipe},{options}')
  if recipe in NETS:
    made.model.trunk = NETS[recipe]
    made.domains = {
      name: {**domain, 'size': 28} for name, domain in made.domains.to_dict().items()
    }
    made.data.size = 28
  made.update_from_flattened_dict(changes)
  return resolve(made)


def permuted(experiment, seed=0):
  """Returns the data sets with the target's labels permuted."""
  rng, datasets = np.random.default_rng(seed), dict(experiment.domains)

  def other(images):
    order, arrays = rng.permutation(len(images.labels)), dict(images.arrays)
    if images.of_pixels:
      maps = np.array(arrays['label'])
      maps[images.rows] = maps[images.rows[order]]
      arrays['label'] = jax.device_put(maps, arrays['label'].sharding)
    return images._replace(labels=images.labels[order], arrays=arrays)

  for name in experiment.roles['target']:
    splits = {split: other(one) for split, one in datasets[name].splits.items()}
    datasets[name] = datasets[name]._replace(splits=splits)
  return datasets


def replaced(experiment):
  """Returns the data sets with other test images: one of them, and the first class."""
  datasets = {}
  for name, dataset in experiment.domains.items():
    tests = {
      split: images._replace(rows=images.rows * 0, labels=images.labels * 0)
      for split, images in dataset.tests.items()
    }
    datasets[name] = dataset._replace(tests=tests)
  return datasets


def given(stage, surveyed):
  """Returns everything that a stage's steps and surgeries get, as NumPy.

  Args:
    stage: a stage of a built experiment.
    surveyed: split -> the pass over it that surgeries can make.
  """
  found = {}
  for name, stream in stage.streams.items():
    found |= {f'{name}/{k}': np.asarray(v) for k, v in stream.arrays.items()}
    for step in range(3):
      payload = stream.payload(step)
      found |= {f'{name}/{step}/{k}': np.asarray(v) for k, v in payload.items()}
  for name, one in stage.compared.items():
    payload = one.stream.payload(0)
    assert 'label' not in payload
    found |= {f'{name}/compared/{k}': np.asarray(v) for k, v in payload.items()}
  for name, one in surveyed.items():
    payload = one.stream.payload(0) | one.stream.arrays
    found |= {f'{name}/surveyed/{k}': np.asarray(v) for k, v in payload.items()}
  for name, mask in stage.groups.items():
    found[f'{name}/group'] = mask
  return found


def differing(before, after):
  """Returns the stages that get anything different."""
  assert before.keys() == after.keys()
  return {
    stage
    for stage, found in before.items()
    if found.keys() != after[stage].keys()
    or not all(np.array_equal(found[key], after[stage][key]) for key in found)
  }


@pytest.mark.parametrize('recipe', ADAPT)
def test_labels_of_the_target_and_test_images_reach_no_step(recipe, monkeypatch):
  """Nothing that a stage gets changes, except in stages that declare it."""
  made, surveyed, survey = config(recipe), [], build.survey

  def recorded(*args, passes, **options):
    surveyed.append(passes)
    return survey(*args, passes=passes, **options)

  def built(datasets=None):
    surveyed.clear()
    experiment = build.build(made, devices=1, datasets=datasets)
    stages = experiment.stages
    every = {
      name: given(stage, passes)
      for (name, stage), passes in zip(stages.items(), surveyed, strict=True)
    }
    return experiment, every

  monkeypatch.setattr(build, 'survey', recorded)
  experiment, before = built()
  labelled = {n for n, one in experiment.stages.items() if one.uses_target_labels}
  assert differing(before, built(permuted(experiment))[1]) == labelled
  assert bool(labelled) == (recipe in LABELLED)
  assert not differing(before, built(replaced(experiment))[1])


def two_steps(experiment):
  """Returns the State after two steps of the last stage on its devices."""
  stage, mesh = experiment.last, experiment.mesh
  arrays = {name: stream.arrays for name, stream in stage.streams.items()}
  key, step = jax.random.key(0), jax.jit(stage.method.step)
  state = train.initial_state(stage.method, stage.streams, key, mesh)
  for number in range(2):
    payloads = sharding.put_batch(mesh, train.payloads_at(stage.streams, number))
    batches = train.batches_at(stage.streams, arrays, payloads, key, number)
    state, _ = step(state, batches)
  return state


def test_a_step_on_the_source_is_the_same_program_with_targets_and_without():
  made = config('source_only')
  programs = []
  for changes in ({}, {'domains': {}, 'target': [], 'open_domains': []}):
    experiment = build.build(made | changes, devices=1)
    stage = experiment.last
    state = train.state_shapes(stage.method, stage.streams)
    zeros = train.empty_totals(stage.method, stage.streams, state, experiment.mesh)
    arrays = {name: stream.arrays for name, stream in stage.streams.items()}
    payloads = jax.tree.map(lambda x: x[None], train.payloads_at(stage.streams, 0))
    update = train.make_update(stage.method, stage.streams, experiment.mesh, 1)
    programs.append(update.lower(state, *zeros, arrays, payloads).as_text())
  assert programs[0] == programs[1]


@pytest.mark.slow  # tests/test_adaptation.py compares them on batches of its own
@pytest.mark.parametrize('devices', [2, 8])
def test_devices_agree_on_the_built_experiment(devices):
  """Two domains and two players; each device has its share of both."""
  made = config('dann')
  one, many = (
    jax.device_get(two_steps(build.build(made, devices=n))) for n in (1, devices)
  )
  for mine, theirs in zip(
    *(jax.tree.leaves((s.params, s.opt)) for s in (one, many)), strict=True
  ):
    np.testing.assert_allclose(theirs, mine, rtol=2e-3, atol=2e-5)


def test_a_surgery_sees_no_label_of_a_target_and_no_test_image():
  stage = build.build(config('dann'), devices=1).last
  seen = []
  state = train.state_shapes(stage.method, stage.streams)
  with pytest.raises(UserError, match='it can see val, train, target/train'):
    stage.survey.outputs(state, 'test')
  with pytest.raises(UserError, match='it can see'):
    stage.survey.outputs(state, 'source/test')

  def keep(outputs, batch):
    seen.extend(batch)
    return {'logits': outputs['logits']}

  fresh = train.initial_state(
    stage.method,
    stage.streams,
    jax.random.key(0),
    sharding.make_mesh(1),
  )
  logits = stage.survey.collect(fresh, 'target/train', keep)['logits']
  assert len(logits) == 600 and 'label' not in seen


def check_what_it_leaves(folder, result):
  """Checks that files and the result agree on each domain."""
  with np.load(folder / 'predictions.npz') as stored:
    arrays = dict(stored)
  names = ['blended', 'inverted', 'source', 'sketched']
  assert arrays['domains'].tolist() == names
  with np.load(folder / 'features.npz') as stored:
    features = dict(stored)
  assert features['domains'].tolist() == names
  assert len(features['features']) == len(features['label'])
  for number, name in enumerate(names):
    own = arrays['domain'] == number
    label, prediction = (
      arrays[f'{name}/{key}'] if number > 1 else arrays[key][own]
      for key in ('label', 'prediction')
    )
    accuracy = result['domains'][name]['accuracy']
    assert (label == prediction).mean() == pytest.approx(accuracy)
    own = features['domain'] == number  # all of them, if fewer than 500
    np.testing.assert_array_equal(features['label'][own], label)
    np.testing.assert_array_equal(features['prediction'][own], prediction)
  rows = read_rows(folder / 'metrics.jsonl')
  last = {row['split']: row['accuracy'] for row in rows if 'accuracy' in row}
  found = result['domains'] | {'all': result['test']}
  for split in ('test', *(f'{name}/test' for name in names)):
    metrics = found[split.removesuffix('/test') if '/' in split else 'all']
    assert last[split] == pytest.approx(metrics['accuracy'])


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Returns (config, folder, result) of a short run with two targets."""
  made = config('dann', 'epochs=1.0,target=blended+inverted')
  for name in ('blended', 'inverted'):
    made['domains'][name]['mean'] = [0.4]
  folder = tmp_path_factory.mktemp('domains')
  return made, folder, run.run(made, folder)


def test_the_headline_is_the_mean_over_the_targets(finished):
  _, folder, result = finished
  domains = result['domains']
  assert set(domains) == {'source', 'blended', 'inverted', 'sketched'}
  targets = [domains[name]['accuracy'] for name in ('blended', 'inverted')]
  assert result['test']['accuracy'] == pytest.approx(np.mean(targets))
  means = result['domain_means']
  every = [*targets, domains['sketched']['accuracy']]
  assert means['compound_open']['accuracy'] == pytest.approx(np.mean(every))
  assert not result['uses_target_labels']
  assert set(result['a_distance']) == {'blended', 'inverted'}
  assert all(0 <= value <= 2 for value in result['a_distance'].values())
  check_what_it_leaves(folder, result)
  (found,) = runs.find(folder)
  assert found.state == 'finished'  # the run's files agree with each other


def test_a_compound_target_is_one_stream_without_domains():
  made = config('dann', 'epochs=1.0,target=blended+inverted')
  stage = build.build(made, devices=1).last
  images = stage.images['target/train']
  assert isinstance(images, Unlabelled) and len(images.rows) == 1200
  assert set(stage.streams['target'].payload(0)) == {'index'}
  made['streams']['target']['domain_labels'] = True
  payload = build.build(made, devices=1).last.streams['target'].payload(0)
  assert set(payload['domain'].tolist()) == {0, 1}


def test_several_sources_tell_the_domain_of_an_image():
  made = config('source_only', 'epochs=1.0,target=blended+inverted')
  made |= {'sources': ['blended', 'inverted'], 'target': ['sketched']}
  made |= {'open_domains': []}
  stage = build.build(made, devices=1).last
  payload = stage.streams['train'].payload(0)
  assert set(payload['domain'].tolist()) == {0, 1}
  assert stage.dataset.counts.sum() == 1200


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'target': ['source']}, "domain 'source' is both source and target"),
    (
      {'domains': {'source': 'digits_domains:source'}},
      "target 'blended' is the same data as 'source', whose labels are learned: ",
    ),
    (
      {'domain': 'copy', 'domains': {}, 'copy': {}},
      "target 'blended' is the same data as 'copy'",
    ),
    (
      {'sources': ['source', 'inverted'], 'copy': {}},
      "source has the domain 'source', which is `data` where there is no other",
    ),
    (
      {'sources': ['blended'], 'target': ['source']},
      "target has the domain 'source', which is `data` where there is no other",
    ),
    ({'domains': {'pad': -1}}, 'domains.blended.pad is -1; it must be from 0 to 256'),
    ({'target': []}, 'there is no target domain: set config.target'),
    ({'target': ['blendet']}, "unknown domain 'blendet'; did you mean 'blended'"),
    ({'domain': 'nowhere'}, "unknown domain 'nowhere'"),
    ({'stages': {'train': {'domain': 'nowhere'}}}, "unknown domain 'nowhere'"),
    ({'select': 'oracle/accuracy'}, 'never chosen by labels of a target'),
    ({'select': 'blended/test'}, 'select is'),
    (
      {'streams': {'sampler': {'name': 'class_balanced'}}},
      "sampler 'class_balanced' needs labels, which the stream 'target' does not",
    ),
    ({'streams': {'batch': 601}}, 'streams.target.batch is 601, but train of target'),
    ({'stream': 3}, 'streams.stream is 3; it must be a dict'),
    ({'streams': {'sampler': 'instance'}}, "sampler is 'instance'; it must be a dict"),
    ({'streams': {'batch': 0.5}}, 'streams.target.batch is 0.5'),
    ({'domains': {'size': 8}}, "the images of domain 'source' are 16x16x3"),
    ({'domains': {'sourc': 'x'}}, "sets 'sourc', but data has no such key"),
    ({'domains': {'source': 'digits', 'size': 16, 'channels': 3}}, None),
  ],
)
def test_mistakes_are_one_line(change, message):
  made = config('dann')
  for key, value in change.items():
    match key:
      case 'streams':
        made['streams']['target'] |= value
      case 'stream':
        made['streams'][key] = value
      case 'domains':
        made['domains']['blended'] |= value
      case 'copy':
        made['domains'] |= {
          'copy': dict(made['domains']['blended']),
          'inverted': {'source': 'digits_domains:inverted'},
        }
      case _:
        made[key] = value
  if message is None:
    made['data'] |= {'test_per_class': 10}
    assert build.build(made).domains['blended'].image_shape == (16, 16, 3)
    return
  with pytest.raises(UserError, match=message) as error:
    build.build(made)
  assert '\n' not in str(error.value)


def test_labels_that_a_stream_does_not_give_are_one_line(tmp_path):
  made = config('dann')
  made['streams']['train'] = {**made['streams']['train'], 'labels': False}
  with pytest.raises(UserError, match='reads labels of a stream that has none'):
    run.rehearsed(made, tmp_path)


@pytest.mark.parametrize(
  ('arrays', 'same'),
  [('part', True), ('all', True), ('other', False), ('one other', False)],
)
def test_a_target_is_the_source_by_its_images(tmp_path, rng, arrays, same):
  """Whatever it is called, and in whatever order, part and split its images are."""
  x = rng.integers(0, 50, (14, 4, 4, 1), np.uint8)
  x[:, 0] = 0  # much is the same in all
  label = np.arange(12) % 3
  own = {'x_train': x[:12], 'y_train': label, 'x_test': x[12:], 'y_test': label[:2]}
  rows = {'part': [3, 1, 13], 'all': [*range(12)], 'other': [0, 1, 2]}
  images = x[rows.get(arrays, [5, 6, 7])]
  images[2 if arrays == 'one other' else slice(0), -1, -1] += 1
  if arrays == 'other':
    images[:, 2, 2] += 1
  theirs = {'x_train': images, 'y_train': np.arange(len(images)) % 3}
  np.savez(tmp_path / 'one.npz', **own)
  np.savez(tmp_path / 'two.npz', **own | theirs)
  made = config('source_only')
  made['data'] |= {'source': f'npz:{tmp_path}/one.npz', 'val_per_class': 1}
  made['domains'] = {'other': {'source': f'npz:{tmp_path}/two.npz'}}
  made |= {'target': ['other'], 'open_domains': [], 'batch': 2, 'eval_batch': 2}
  made['model'] |= {'trunk': 'tiny_cnn'}
  if not same:
    experiment = build.build(made, devices=1)
    assert experiment.roles['target'] == ('other',)
    # Two test images and, of the training images, those that were not changed.
    there = 2 + (2 if arrays == 'one other' else 0)
    assert experiment.sharing == {'source': there}
    assert uses_target_labels(experiment)
    assert any(f'{there} images of a target' in line for line in cautions(experiment))
    return
  with pytest.raises(UserError, match="'other' is the same data as 'source'"):
    build.build(made, devices=1)


def test_files_are_the_same_where_they_are_in_one_place():
  names = ('a', 'b')
  one, two = (
    Files(root, ['1', '2', '3'], ['1', '2', '3'], np.zeros(3, np.int32), names)
    for root in ('one', 'two')
  )

  def split(source, *rows):
    return Split(source, np.array(rows, int), np.zeros(len(rows), np.int32), {})

  others = [split(two, 0), split(one, 0), split(one, 1, 2)]
  assert shared(split(one, 1, 0), others) == 2
  assert shared(split(one, 1, 0), [split(one, 1)]) == 1
  assert shared(split(one, 1), [split(two, 1)]) == 0


def test_keys_of_a_domain_that_no_role_uses_are_rejected():
  """A config file may have more domains than it uses; of these there is a warning."""
  made = config('source_only')
  made['domains']['other'] = {'source': 'nothing:'}
  check_set_domains(made, {'epochs': 1.0, 'domains.blended.source': 'x'})
  for given in (
    {'domains.other.source': 'x'},
    {'domains': {'blended': {}, 'other': {}}},
  ):
    with pytest.raises(UserError, match="domains.other is set, but domain 'other' has"):
      check_set_domains(made, given)
  made['stages'] = {'train': {'domain': 'other'}}
  check_set_domains(made, {'domains.other.source': 'x'})


def test_classes_that_do_not_agree_are_named():
  experiment = build.build(config('dann'), devices=1)
  names = list('0123456789')
  names[3] = 'three'
  wrong = experiment.domains['blended']._replace(class_names=tuple(names))
  with pytest.raises(UserError, match="class 3 is '3' in one and 'three' in the other"):
    build.build(config('dann'), datasets=experiment.domains | {'blended': wrong})
  longer = experiment.domains['sketched']._replace(class_names=(*'0123456789', 'ten'))
  with pytest.raises(UserError, match="have 10 and 11: 'ten' is in one"):
    build.build(config('dann'), datasets=experiment.domains | {'sketched': longer})


def test_the_network_predicts_as_the_first_target_is_normalised(finished):
  made, folder, _ = finished
  network = trained.open_run(folder)
  assert network.facts['preprocessing']['mean'] == [0.4]
  assert network.predicts_by == "normalised as 'blended'; batch statistics: none"
  images = build.build(made).domains['inverted'].tests['test'].source.images
  outputs = network.stage.method.predict(network.state, np.float32(images[:4]) / 255)
  assert outputs['logits'].shape == (4, 10)


def test_it_says_whose_normalisation_and_statistics_predict():
  by = {}
  for recipe, options in {
    'source_only': {},
    'dann': {'statistics': 'joint'},
    'deep_coral': {'statistics': 'domain_specific'},
  }.items():
    made = config(recipe)
    made['model'] |= {'trunk': 'tiny_cnn', 'trunk_options': {'width': 4}}
    made['alignment']['align_on'] = ['features']
    made['method'] |= options
    by[recipe] = build.build(made, devices=1)
  statistics = {name: one.predicts_by for name, one in by.items()}
  left = "normalised as 'blended'; batch statistics: left by training on source"
  assert statistics['source_only'] == left
  assert statistics['dann'] == f'{left} and target'
  own = "batch statistics: the target's own"
  assert statistics['deep_coral'] == f"normalised as 'blended'; {own}"
  experiment = by['deep_coral']
  evaluated = experiment.evaluates_by(experiment.last)
  assert evaluated.endswith(f"{own}, for images of 'source' its own")


def test_progress_counts_within_a_stage_that_carries_the_clock(monkeypatch):
  """From 0 where the stage starts, at the end of the previous one, to 1."""
  seen = []

  def spy(net, optimizer, loss, *, class_weights, reduction, progress):
    seen.append(progress)
    parts = {'class_weights': class_weights, 'reduction': reduction}
    return METHODS['supervised'](net, optimizer, loss, **parts)

  monkeypatch.setitem(METHODS, 'spy', spy)
  made = config('source_only', 'epochs=2.0')
  made['method'] = {'name': 'spy'}
  carry = ['carry', {'fields': ['opt', 'step'], 'stage': 'train'}]
  made['stages'] = {
    'train': {},
    'more': {'epochs': 6.0, 'surgeries': [carry]},
    'anew': {'epochs': 6.0},
  }
  made['stage_order'] = ['train', 'more', 'anew']
  stages = build.build(made, devices=1).stages
  first, last = stages['train'].plan.steps, stages['more'].plan.steps
  middle = (first + last) // 2
  begun, more, anew = (
    [float(p(np.int32(s))) for s in (0, first, middle, last)] for p in seen
  )
  assert begun[:2] == [0, 1] and anew[0] == 0 and anew[-1] == 1
  assert more == pytest.approx([0, 0, (middle - first) / (last - first), 1])
  assert anew[1] == pytest.approx(first / last)


def test_the_source_is_measured_with_statistics_of_its_own():
  """If each domain has its own; the target and open domains use the target's."""
  made = config('deep_coral')
  made['method']['statistics'] = 'domain_specific'
  made['model'] |= {'trunk': 'tiny_cnn', 'trunk_options': {'width': 4}}
  experiment = build.build(made, devices=1)
  stage = experiment.last
  key = jax.random.key(0)
  state = train.initial_state(stage.method, stage.streams, key, experiment.mesh)
  own = jax.tree.map(lambda x: x + 1.0, state.stats['net'])
  state = state.replace(stats=state.stats | {'net_source': own})
  swapped = state.replace(stats=state.stats | {'net': own})
  predict = jax.jit(stage.method.predict)

  def keep(outputs, batch):
    return {'logits': outputs['logits']}

  collect = collector(stage.method.predict, keep, experiment.mesh)
  for split, by in {
    'val': swapped,
    'source/test': swapped,
    'test': state,
    'sketched/test': state,
  }.items():
    one = stage.passes[split]
    payload = one.stream.payload(0)
    batch = one.stream.prepare(one.stream.arrays, payload, None)
    expected = predict(by, batch['image'])['logits']
    found = collect(state, one)['logits']
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-5)
  assert not np.allclose(
    predict(swapped, batch['image'])['logits'], predict(state, batch['image'])['logits']
  )


def test_a_state_is_chosen_by_training_images_of_the_target(monkeypatch):
  """Label-free criteria see no label of the target and no test image."""
  seen, scores = [], build.label_free_scores

  def recorded(method, task, passes, mesh):
    seen.append(passes)
    return scores(method, task, passes, mesh)

  monkeypatch.setattr(build, 'label_free_scores', recorded)
  experiment = build.build(config('source_only'), devices=1)
  (passes,) = seen
  assert set(passes) == {'train', 'val', 'target/train'}
  for name, one in passes.items():
    domain = 'blended' if name == 'target/train' else 'source'
    split = experiment.domains[domain].splits[name.removeprefix('target/')]
    payload, arrays = one.stream.payload(0), one.stream.arrays
    assert ('label' in payload) == (domain == 'source')
    assert arrays['image'] is split.arrays['image']
    assert set(payload['index'].tolist()) <= set(split.rows.tolist())


@pytest.mark.parametrize('stream', ['train', 'target'])
def test_a_stream_that_is_needed_cannot_skip_steps(tmp_path, stream):
  made = config('dann')
  made['streams'][stream]['every'] = 2
  with pytest.raises(UserError, match=f'streams.{stream}.every is 2, but the method'):
    run.rehearsed(made, tmp_path)


def test_targets_of_one_stream_are_read_in_one_way():
  made = config('dann', 'epochs=1.0,target=blended+inverted')
  made['domains']['inverted']['resize'] = 40
  with pytest.raises(UserError, match='are one target and must agree in data.resize'):
    build.build(made, devices=1)


def test_images_of_a_compound_target_lie_once_in_device_memory():
  made = config('dann', 'epochs=1.0,target=blended+inverted')
  experiment = build.build(made, devices=1)
  whole = experiment.last.images['target/train']
  alone = build.build(config('dann', 'epochs=1.0,target=inverted'), devices=1)
  for name in ('blended', 'inverted'):
    own = experiment.domains[name].splits['train']
    assert own.arrays['image'] is whole.arrays['image']
  assert not hasattr(whole.source, 'encoded')  # it is of arrays, not of files
  expected = alone.domains['inverted'].splits['train']
  np.testing.assert_array_equal(own.labels, expected.labels)
  for place in (0, 7, -1):
    image = expected.image(expected.rows[place])
    np.testing.assert_array_equal(own.image(own.rows[place]), image)
    np.testing.assert_array_equal(
      own.arrays['image'][own.rows[place] + own.offset], image
    )
  # Nor does building from existing data place them again, as for other seeds.
  again = build.build(made, devices=1, datasets=experiment.domains)
  other = again.last.images['target/train']
  assert other.arrays['image'] is whole.arrays['image']
  np.testing.assert_array_equal(other.rows, whole.rows)
  assert again.fingerprint == experiment.fingerprint


def test_only_a_domain_that_is_alone_is_standardised():
  made = config('dann', 'epochs=1.0,target=blended+inverted')
  made['data']['standardise'] = True
  with pytest.raises(UserError, match="'blended' and 'inverted' are one target, but"):
    build.build(made)


def test_a_stage_on_the_targets_classes_says_that_it_reads_labels():
  """Its passes, shot groups and selection would read them, whatever its streams do."""
  made = config('source_only')
  made['stages']['train'] |= {
    'domain': 'blended',
    'streams': {'train': {'split': 'train', 'domain': 'source'}},
  }
  assert build.build(made, devices=1).last.uses_target_labels


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'domain': 'sketched'}, "domain 'sketched' is open, so training must not use"),
    ({'domain': 'open'}, "domain 'open' is open, so training must not use it"),
  ],
)
def test_an_open_domain_is_no_stream(row, message):
  made = config('dann')
  made['streams']['target'] = {**made['streams']['target'], **row}
  with pytest.raises(UserError, match=message):
    build.build(made, devices=1)


def test_the_meta_set_of_a_target_needs_its_labels():
  made = config('dann')
  made['domains']['blended']['meta_per_class'] = 5
  made['streams']['target'] = {**made['streams']['target'], 'split': 'meta'}
  with pytest.raises(UserError, match='meta set of a target is drawn by its labels'):
    build.build(made, devices=1)


def test_initial_weights_may_have_read_labels_of_the_target(tmp_path):
  """So says the result, or without one the start of an unfinished run."""
  (tmp_path / 'config.json').write_text('{"init": ""}')
  for used in (True, False):
    row = {
      'event': 'started',
      'time': 0,
      'pid': 1,
      'host': '',
      'uses_target_labels': used,
    }
    (tmp_path / 'events.jsonl').write_text(f'{json.dumps(row)}\n')
    assert ours.used_target_labels(str(tmp_path)) is used
  for used in (True, False):
    (tmp_path / 'result.json').write_text(
      f'{{"uses_target_labels": {str(used).lower()}}}'
    )
    assert ours.used_target_labels(str(tmp_path)) is used
  assert not ours.used_target_labels('') and not ours.used_target_labels('timm/x')


@pytest.mark.parametrize('used', [True, False])
def test_what_weights_began_with_may_have_read_labels_of_the_target(tmp_path, used):
  first, second = tmp_path / 'first', tmp_path / 'second'
  for folder, told, init in ((first, used, ''), (second, False, str(first))):
    folder.mkdir()
    (folder / 'result.json').write_text(json.dumps({'uses_target_labels': told}))
    (folder / 'config.json').write_text(json.dumps({'init': init}))
  assert ours.used_target_labels(str(second)) is used
  path = tmp_path / 'net.safetensors'
  told = {'uses_target_labels': json.dumps(used)}
  save_file({'x': np.zeros(1, np.float32)}, path, told)
  assert ours.used_target_labels(str(path)) is used


def test_initial_weights_may_have_learned_the_target_as_their_own_data(tmp_path):
  """Alone, as one of several sources, or as the data of a single stage."""
  split = {'dir': '', 'train_split': 'train', 'test_split': 'test'}
  at = [{'source': f'npz:{n}.npz', **split} for n in 'ab']
  domains = {'b': {'source': 'npz:b.npz'}}
  for before, learned in (
    ({'data': {'source': 'npz:a.npz'}}, [True, False]),
    ({'data': {}, 'domains': domains, 'sources': ['b']}, [False, True]),
    ({'data': {}, 'domains': domains, 'target': ['b']}, [False, False]),
    ({'data': {}, 'domains': domains, 'stages': {'x': {'domain': 'b'}}}, [False, True]),
  ):
    (tmp_path / 'config.json').write_text(json.dumps(before))
    told = [ours.used_target_labels(str(tmp_path), [target]) for target in at]
    assert told == learned, before

  for train_split, learned in (('train', True), ('test', True), ('webcam', False)):
    own = {'source': 'npz:a.npz', 'train_split': train_split}
    (tmp_path / 'config.json').write_text(json.dumps({'data': own}))
    assert ours.used_target_labels(str(tmp_path), at) is learned
  (tmp_path / 'config.json').write_text(json.dumps({'data': {'source': 'fake'}}))
  assert not ours.used_target_labels(str(tmp_path), [{'source': 'fake', **split}])
  for damaged in ({'data': 5}, {'data': {}, 'sources': ['nowhere']}):
    (tmp_path / 'config.json').write_text(json.dumps(damaged))
    with pytest.raises(UserError, match=f'the config of {tmp_path} is damaged'):
      ours.used_target_labels(str(tmp_path), at)
  foreign = tmp_path / 'foreign.safetensors'
  save_file({'x': np.zeros(1, np.float32)}, foreign, {'config': 'resnet18'})
  assert not ours.used_target_labels(str(foreign), at)

  own = {'data': {'source': 'digits_domains:blended'}}
  (tmp_path / 'config.json').write_text(json.dumps(own))
  experiment = build.build(config('dann'), devices=1)
  assert not uses_target_labels(experiment)
  begun = {**experiment.config, 'init': str(tmp_path)}
  experiment = experiment._replace(config=begun)
  assert uses_target_labels(experiment)
  assert any('trained with labels of a target' in line for line in cautions(experiment))
