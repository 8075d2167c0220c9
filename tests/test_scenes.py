"""Street scenes: reproducible drawings, and an end-to-end run."""

import types

import numpy as np
import pytest
from PIL import Image

from configs import scenes as config_file
from lt_jax import build, options, predict, run, trained
from lt_jax.config import resolve
from lt_jax.data import scenes
from lt_jax.data.masks import VOID
from lt_jax.data.palettes import palette
from lt_jax.doctor import data
from lt_jax.doctor.case import CheckSkipped
from lt_jax.errors import UserError
from lt_jax.report.page import write
from tests import tiny

pytestmark = pytest.mark.usefixtures('one_device')

TINY = {'train': 16, 'val': 8, 'test': 8}


@pytest.fixture(autouse=True)
def few(monkeypatch):
  monkeypatch.setattr(scenes, 'SPLITS', TINY)


def config(arg, **changes):
  made = config_file.get_config(arg)
  made.update(batch=8, eval_batch=8, log_every_steps=2)
  made.model.trunk_options = {'width': 4}
  made.update(changes)
  return resolve(made)


def test_domains_differ_in_looks_and_share_test_layouts_alone():
  sim, real = (scenes.scenes(f'{name},train=16') for name in ('sim', 'real'))
  np.testing.assert_array_equal(sim['test'].maps, real['test'].maps)
  assert (sim['train'].maps != real['train'].maps).any()
  assert (sim['test'].images != real['test'].images).mean() > 0.9
  again = scenes.scenes('real,train=8')['train']
  np.testing.assert_array_equal(again.images, real['train'].images[:8])
  np.testing.assert_array_equal(again.maps, real['train'].maps[:8])


@pytest.mark.parametrize('domain', scenes.RENDERINGS)
def test_every_class_is_there_and_the_rare_are_rare(domain):
  source = scenes.scenes(f'{domain},train=50')['train']
  assert source.images.dtype == np.uint8 and source.images.shape == (50, 64, 64, 3)
  share = source.class_pixels(np.arange(50)).sum(0) / source.maps.size
  assert share.sum() == pytest.approx(1) and (share[:4] > 0.05).all()
  assert (share[4:] > 0.002).all() and (share[5:] < 0.03).all()
  assert source.images.std() > 10


def test_options_change_the_layouts_of_training_images():
  plain = scenes.scenes('sim,train=50')
  rare = scenes.scenes('sim,train=50,tail=10')
  pixels = [one['train'].class_pixels(np.arange(50)).sum(0) for one in (plain, rare)]
  assert (pixels[1][4:] < 0.35 * pixels[0][4:]).all()
  np.testing.assert_array_equal(plain['test'].maps, rare['test'].maps)
  moved = scenes.scenes('sim,train=50,layout=1')['train'].class_pixels(np.arange(50))
  sky, building = moved.sum(0)[[scenes.SKY, scenes.BUILDING]]
  assert sky < pixels[0][scenes.SKY] and building < pixels[0][scenes.BUILDING]
  border = scenes.scenes('sim,train=8,border=1')['train'].maps
  assert 0.02 < (border == VOID).mean() < 0.3


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('sum', "unknown domain of scenes 'sum'; did you mean 'sim'"),
    ('sim,trian=3', "unknown option 'trian'; did you mean 'train'"),
    ('sim,train=0', "train is '0'; it must be from 1"),
    ('sim,tail=x', "tail is 'x'; it must be from 1"),
  ],
)
def test_mistakes_in_the_name_of_a_domain_are_reported(argument, message):
  with pytest.raises(UserError, match=message):
    scenes.scenes(argument)


def test_a_run_from_end_to_end_and_its_report(tmp_path):
  """Trains on the source; a compound target, an open domain, selection by entropy."""
  made = config('source_only,train=16,steps=4,target=fog+rain', select='target/entropy')
  result = run.run(made, tmp_path)
  assert set(result['domains']) == {'fog', 'rain', 'source', 'snow'}
  assert set(result['domain_means']) == {'compound', 'compound_open'}
  mean = np.mean([result['domains'][name]['miou'] for name in ('fog', 'rain')])
  assert result['test']['miou'] == pytest.approx(mean)
  assert len(result['test']['iou_by_class']) == 7
  assert not result['uses_target_labels'] and result['best_on_test']['miou'] >= 0
  with np.load(tmp_path / 'predictions.npz') as stored:
    assert stored['confusion'].shape == (16, 7, 7)
    assert stored['confusion'].sum() == 16 * 64 * 64
    assert stored['snow/confusion'].shape == (8, 7, 7)
  with np.load(tmp_path / 'samples.npz') as stored:
    assert stored['snow/test/prediction'].shape == (4, 64, 64)
    images = scenes.scenes('snow')['test'].images[:4]
    np.testing.assert_array_equal(stored['snow/test/image'], images)
  with pytest.raises(UserError, match='predicts a class for every pixel'):
    trained.open_run(tmp_path).check_whole(tmp_path)
  check_predicted_maps(tmp_path)
  adapted = config('minent,train=16,steps=4,target=fog+rain')
  trained.build_without_data(adapted, trained.read_facts(tmp_path))
  page = write(tmp_path).read_text()
  assert (
    'mIoU' in page and '>By class</h2>' in page and 'unexpected contents' not in page
  )
  assert page.count(': prediction"') == 4 * 3  # targets, source, snow
  assert '#46' in page  # the colour of buildings


def check_predicted_maps(workdir):
  """Predicting image files gives the label maps that the run's evaluation drew."""
  with np.load(workdir / 'samples.npz') as stored:
    images, expected = stored['snow/test/image'], stored['snow/test/prediction']
  folder = workdir / 'photos'
  (folder / 'more').mkdir(parents=True)
  places = ['a.png', 'b.png', 'more/a.png']
  for place, image in zip(places, images, strict=False):
    Image.fromarray(image).save(folder / place)
  Image.fromarray(images[0]).resize((128, 96)).save(folder / 'large.jpg')
  out = workdir / 'maps'
  assert predict.predict(workdir, [str(folder)], str(out)) == 4
  for place, ids in zip(places, expected, strict=False):
    with Image.open(out / place) as found:
      np.testing.assert_array_equal(np.asarray(found), ids)
      assert found.getpalette()[:3] == [*palette(scenes.CLASSES)[0]]
  with Image.open(out / 'large.png') as found:
    assert found.size == (128, 96)
  assert (out / 'more/a_overlay.jpg').exists()
  for given, message in (
    (str(folder), 'would replace an image'),
    (str(workdir), 'the folder of a run'),
    (str(workdir / 'result.json'), 'label maps need a folder'),
  ):
    with pytest.raises(UserError, match=message):
      predict.predict(workdir, [str(folder)], given)
  Image.fromarray(images[0]).save(folder / 'a.jpg')
  with pytest.raises(UserError, match='would have the same label map'):
    predict.predict(workdir, [str(folder)], str(out))


@pytest.mark.parametrize('recipe', ['balanced_softmax', 'ldam_drw', 'cb_focal', 'fda'])
def test_recipes_of_long_tails_and_of_adaptation_learn_by_pixels(recipe):
  made = config(f'{recipe},train=16')
  if recipe == 'cb_focal':
    made['model']['head'] = 'linear'
  experiment = build.build(made, devices=1)
  stage = experiment.last
  pixels = (
    experiment.domains['source'].splits['train'].source.class_pixels(np.arange(16))
  )
  np.testing.assert_array_equal(experiment.dataset.counts, pixels.sum(0))
  assert stage.streams['train'].payload_shapes().keys() == {'index'}
  assert not stage.uses_target_labels


def test_weights_and_hard_pixels_from_the_command_line(tmp_path):
  made = config_file.get_config('ce,train=16')
  given = {'loss.hardest': '0.25', 'class_weights.name': 'median_frequency'}
  options.prepare(made, given)
  made.loss.hardest, made.class_weights.name = 0.25, 'median_frequency'
  build.build(resolve(made), devices=1)
  images = tiny.config(
    tiny.write_npz(tmp_path / 'x.npz'), 'ce', class_weights={'name': 'median_frequency'}
  )
  with pytest.raises(UserError, match="label maps, but .* take 'inverse_frequency'"):
    build.build(images, devices=1)


def test_the_doctor_counts_pixels():
  dataset = build.build(config('source_only,train=16'), devices=1).dataset
  case = types.SimpleNamespace(dataset=dataset)
  texts = [finding.text for finding in data.splits(case)]
  assert texts[0] == 'train: 16 images, 65,536 labelled pixels of 7 of 7 classes'
  assert not [*data.classes(case)]
  with pytest.raises(CheckSkipped, match='classes are measured by their IoU'):
    next(data.balanced_test(case))


def test_a_task_and_its_labels_must_fit():
  with pytest.raises(UserError, match="set task to 'segmentation', not 'classificat"):
    build.build(config('source_only,train=16', task='classification'), devices=1)
  with pytest.raises(UserError, match='data.val_per_class is for images of one class'):
    made = config('source_only,train=16')
    made['data']['val_per_class'] = 2
    build.build(made, devices=1)
