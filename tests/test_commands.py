"""Flags, config files, and the final line of a command."""

import importlib.machinery
import sys

import pytest
from absl import flags

from lt_jax import commands, config_file, errors, files, main, provenance
from lt_jax.config import resolve
from lt_jax.data.sources import load_source
from lt_jax.errors import UserError
from tests import child

FLAGS = flags.FLAGS


@pytest.fixture
def parse(monkeypatch):
  """Returns a function from a command line to its config as plain data."""
  commands.config_flag()

  def forget():
    for name in [name for name in FLAGS if name.startswith('config.')]:
      delattr(FLAGS, name)

  def parsed(*arguments):
    forget()
    monkeypatch.setattr(sys, 'argv', ['command', *arguments])
    try:
      FLAGS(sys.argv)
    except flags.Error as error:
      raise commands.cause(error) from None
    return resolve(FLAGS.config)

  yield parsed
  forget()
  FLAGS.unparse_flags()


def test_help_shows_config_and_workdir_with_an_example(tmp_path):
  output = tmp_path / 'help.log'
  assert child.run(['--help'], output) == 0
  printed = output.read_text()
  assert '--config: ' in printed and '--workdir: ' in printed
  assert 'such as digits_lt:ldam_drw' in printed
  assert '--config=digits_lt:ldam_drw --workdir=' in main.__doc__


MINE = """
import jax.numpy as jnp
from lt_jax.losses import LOSSES
from lt_jax.recipes import RECIPES, Recipe

def zero(logits, labels):
  return jnp.zeros(len(labels))

LOSSES['zero'] = zero
RECIPES['nothing'] = Recipe(lambda config: {'loss': {'name': 'zero'}})
"""


def test_a_module_adds_a_recipe_to_every_command(tmp_path):
  """To the command that trains, where it precedes --config, and to others."""
  output, workdir = tmp_path / 'out', tmp_path / 'run'
  (tmp_path / 'mine.py').write_text(MINE)
  (tmp_path / 'wrong').mkdir()
  (tmp_path / 'wrong/__init__.py').write_text('\n1 / 0')
  train = child.command(workdir, config='digits_lt.py:nothing,epochs=1')
  for given, told in (
    ([], "unknown recipe 'nothing'"),
    (['--import=nine'], '--import=nine: there is no such module in this folder or on'),
    (['--import=mine.py'], '--import=mine.py: give the name of the module, without'),
    (['--import=wrong.one'], '/wrong/__init__.py:2: ZeroDivisionError: division by'),
  ):
    assert child.run([*train, *given], output, f'path:{tmp_path}') == 2
    assert told in output.read_text()
  train += ['--import', 'mine']
  assert child.run(train, output, f'path:{tmp_path}') == 0, output.read_text()
  of_it = [f'--workdir={workdir}', '--import=mine']
  assert child.run(of_it, output, f'path:{tmp_path}', 'lt_jax.evaluate') == 0


def test_a_syntax_error_names_its_own_file(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'unparsable.py').write_text('\na b')
  (tmp_path / 'made.py').write_text('import unparsable')
  with pytest.raises(UserError, match=r'/unparsable\.py:2: SyntaxError'):
    config_file.loader(str(tmp_path / 'made.py'))


def test_a_run_knows_its_command(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['main.py', '--config=x:ce', 'two words', '\udcff'])
  for name, told in (
    ('lt_jax.main', 'python -m lt_jax.main'),
    ('lt_jax.doctor.__main__', 'python -m lt_jax.doctor'),
    ('pytest.__main__', ''),
    (None, ''),
  ):
    spec = name and importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setattr(sys.modules['__main__'], '__spec__', spec)
    given = " --config=x:ce 'two words' '\udcff'" if told else ''
    assert provenance.command() == told + given


def test_modules_are_imported_before_the_config_is_made():
  given = ['--config=x', '-import', 'a', 'one.png', '--import=b', '--', '--import=c']
  wanted = ['-import', 'a', '--import=b', '--config=x', 'one.png', '--', '--import=c']
  assert commands._imports_first(given) == wanted
  assert commands._imports_first(['--import']) == ['--import']  # absl says what lacks


def test_a_key_of_a_domain_that_no_role_uses_is_rejected(tmp_path):
  options = child.two_domains('source_only')
  given = ('--config.domains.blended.source=x', "--config.target=('sketched',)")
  command = child.command(
    tmp_path / 'run', *given, '--config.open_domains=()', **options
  )
  assert child.run(command, tmp_path / 'out') == 2
  (line,) = (tmp_path / 'out').read_text().splitlines()
  assert line.startswith('error: config.domains.blended is set, but domain')
  assert line.endswith('the target is sketched') and not (tmp_path / 'run').exists()


def test_a_shipped_config_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shipped = {path.stem for path in (child.ROOT / 'configs').glob('*.py')}
  assert {path.stem for path in config_file.SHIPPED.glob('*.py')} == shipped
  assert config_file.make('digits_lt:ce,epochs=7').epochs == 7
  own = tmp_path / 'digits_lt.py'
  own.write_text('from ml_collections import ConfigDict\nget_config = ConfigDict\n')
  assert config_file.make('digits_lt.py') == config_file.make(str(own))
  with pytest.raises(
    UserError, match=r"digits_l.py; did you mean 'digits_lt'\? Give a config"
  ):
    config_file.make('configs/digits_l.py')
  with pytest.raises(UserError, match="did you mean 'digits_domains', 'digits_lt', "):
    config_file.make('digits')
  with pytest.raises(UserError, match=r'known: .*places_lt, .*\. Give .* without '):
    config_file.make('nothing_here.py:ce')


def test_an_empty_config_is_reported():
  with pytest.raises(UserError, match='--config is empty: name a config'):
    config_file.make('')


def test_an_option_without_its_value_is_reported():
  with pytest.raises(UserError, match="option 'epochs' of the config needs a value"):
    config_file.make('digits_lt:ce,epochs')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('\0', ': SyntaxError: source code '),
    ('def get_config():\n  return 1 / 0\n', ':2: ZeroDivisionError: division by'),
    ('import lt_jaxx\n', ":1: ModuleNotFoundError: No module named 'lt_jaxx'"),
    ('\n\nx = (\n', ":3: SyntaxError: '(' was never closed"),
    ('import json\ndef get_config():\n  json.loads("")\n', ':3: JSONDecodeError: Exp'),
    (
      'def get_config():\n  return {}\n',
      ': get_config must return a ConfigDict; it returns dict',
    ),
    ('x = 1\n', ' defines no function get_config'),
    ('import sys\nsys.exit(0)\n', ':2: SystemExit: 0'),
  ],
)
def test_an_error_in_a_config_file_names_file_and_line(tmp_path, text, message):
  path = tmp_path / 'own.py'
  path.write_text(text)
  with pytest.raises(UserError) as error:
    config_file.make(str(path))
  assert str(error.value).startswith(f'{path}{message}')
  assert str(error.value).count('own.py') == 1


@pytest.mark.parametrize(
  ('keys', 'path', 'value'),
  [
    ({'optimizer.name': 'adam'}, 'optimizer', {'name': 'adam', 'weight_decay': ...}),
    (
      {'optimizer.name': 'adam', 'optimizer.b1': '0.8'},
      'optimizer',
      {'name': 'adam', 'b1': 0.8, 'weight_decay': ...},
    ),
    (
      {'schedule.name': 'cosine', 'schedule.end': '4'},
      'schedule',
      {'name': 'cosine', 'base': ..., 'end': 4.0, 'warmup': ..., 'warmup_epochs': ...},
    ),
    (
      {'loss.name': 'cross_entropy', 'loss.label_smoothing': '0.1'},
      'loss',
      {'name': 'cross_entropy', 'label_smoothing': 0.1},
    ),
    (
      {'optimizer.nesterov': 'true'},
      'optimizer',
      {'name': 'sgd', 'momentum': ..., 'nesterov': True, 'weight_decay': ...},
    ),
    (
      {'class_weights.name': 'effective_number', 'class_weights.beta': '0.9'},
      'class_weights',
      {'name': 'effective_number', 'beta': 0.9, 'start_epoch': ...},
    ),
    (
      {'alignment.name': 'coral', 'alignment.form': 'adapt'},
      'alignment',
      {'name': 'coral', 'form': 'adapt', 'align_on': ..., 'weight': ...},
    ),
    ({'wrappers.ema.decay': '0.9'}, 'wrappers', {'ema': {'decay': 0.9}}),
    (
      {'stages.train.wrappers.ema.decay': '0.9'},
      'stages.train.wrappers.ema.decay',
      0.9,
    ),
    ({'model.head': 'linear'}, 'model.head_options', {}),
    ({'model.trunk': 'tiny_cnn'}, 'model.trunk_options', {}),
    ({'model.trunk_options.width': '8'}, 'model.trunk_options', {'width': 8}),
    (
      {'stages.train.schedule.name': 'constant', 'schedule.name': 'cosine'},
      'stages.train.schedule',
      {'name': 'constant', 'base': ..., 'warmup': ..., 'warmup_epochs': ...},
    ),
    (
      {'optimizer.name': 'adam', 'stages.train.optimizer.b2': '0.9'},
      'stages.train',
      {'optimizer': {'b2': 0.9}},
    ),
    ({'optimizer.name': 'sgd'}, 'optimizer.momentum', 0.9),
  ],
)
@pytest.mark.parametrize('order', [1, -1])
def test_any_option_of_any_named_function(parse, keys, path, value, order):
  """A new name drops the old name's options; the order does not matter."""
  arguments = [f'--config.{key}={text}' for key, text in keys.items()][::order]
  found = parse('--config=digits_lt:ldam_drw', *arguments)
  for part in path.split('.'):
    found = found[part]
  if isinstance(value, dict):
    assert found.keys() == value.keys()
    assert all(found[k] == v for k, v in value.items() if v is not ...)
  else:
    assert found == value


def test_a_domain_takes_every_key_of_data(parse):
  option = '--config.domains.blended.val_per_class'
  found = parse('--config=digits_domains:dann', f'{option}=5')
  assert found['domains']['blended']['val_per_class'] == 5
  with pytest.raises(UserError, match="per_clas; did you mean 'val_per_class'"):
    parse('--config=digits_domains:dann', '--config.domains.blended.val_per_clas=5')


def test_a_stage_that_follows_drops_options_with_the_top_level(parse):
  found = parse('--config=digits_lt:fslwf', '--config.optimizer.name=adam')
  assert 'nesterov' not in found['stages']['generator']['optimizer']
  found = parse('--config=digits_lt:fslwf', '--config.optimizer.momentum=0.8')
  assert found['stages']['generator']['optimizer']['nesterov'] is True


@pytest.mark.parametrize(
  ('key', 'message'),
  [
    ('epoch=3', "unknown config key epoch; did you mean 'epochs'"),
    ('datta.source=digits', "unknown config key datta; did you mean 'data'"),
    ('data.sourse=digits', "unknown config key data.sourse; did you mean 'source'"),
    ('optimizer.momentun=1', "optimizer.name is 'sgd'; did you mean 'momentum'"),
    ('schedule.bas=1', "schedule.name is 'step_decay'; did you mean 'base'"),
    ('loss.gama=1', "key loss.gama: loss.name is 'cross_entropy'; known: auxiliary"),
    ('wrappers.emma.decay=1', "unknown wrapper 'emma'; did you mean 'ema'"),
    ('wrappers.ema.decy=1', "the wrapper is 'ema'; did you mean 'decay'"),
    ('optimizer.name=adm', "unknown optimizer 'adm'; did you mean 'adam'"),
    ('optimizer.name.x=1', "optimizer.name is 'sgd'; it has no further keys"),
    ('stages.trian.epochs=1', "unknown config key stages.trian; did you mean 'train'"),
    ('stages.train.epohs=1', 'key stages.train.epohs; did you mean'),
    ('train.epochs=1', "key train.epochs; did you mean 'stages.train.epochs'?"),
    ('batch=2.5', "config.batch is '2.5'; it must be a whole number"),
    ('epochs=abc', "config.epochs is 'abc'; it must be a finite number"),
    ('epochs=nan', "config.epochs is 'nan'; it must be a finite number"),
    ('optimizer.nesterov=maybe', "nesterov is 'maybe'; it must be true or false"),
    ('optimizer=adam', "config.optimizer cannot be 'adam': set config.optimizer.name"),
    ('stages=3', "config.stages cannot be '3': set one of its keys (train), as "),
    ('model.trunk_options=4', "trunk_options cannot be '4': give a dict"),
  ],
)
def test_a_key_that_is_wrong_is_reported_with_the_near_miss(parse, key, message):
  with pytest.raises((UserError, flags.Error)) as error:
    parse('--config=digits_lt:ce', f'--config.{key}')
  assert message in str(commands.cause(error.value)) and '--config' not in message


@pytest.mark.parametrize(
  'message',
  [
    r'C:\new\photo.jpg: the file is empty',
    "'quoted' at both 'ends'",
    '"a path"',
    'two  blanks and a\ttab, and blanks at the end  ',
  ],
)
def test_a_message_is_reported_unchanged(message, capsys):
  with pytest.raises(SystemExit):
    commands.fail(UserError(message), errors.WRONG_INPUT)
  assert capsys.readouterr().err == f'error: {message}\n'


def test_a_message_of_many_lines_is_one(capsys):
  with pytest.raises(SystemExit):
    commands.fail('first\n  second\r\nthird\n', errors.WRONG_INPUT)
  assert capsys.readouterr().err == 'error: first second third\n'


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('s3://bucket/run', 's3://bucket/run needs a package: pip install s3fs'),
    ('az://bucket/run', 'az://bucket/run needs a package: pip install adlfs'),
    ('S3://bucket/run', "unknown object store 'S3'; did you mean 's3'"),
    ('https://host/run', "unknown object store 'https'"),
  ],
)
def test_a_store_that_cannot_be_read_is_reported(path, message, monkeypatch):
  monkeypatch.setattr(files, 'find_spec', lambda name: None)
  with pytest.raises(UserError) as error:
    files.make_workdir(path)
  assert message in str(error.value)


def test_a_home_folder_is_expanded_behind_an_equals_sign(tmp_path, monkeypatch, parse):
  monkeypatch.setenv('HOME', str(tmp_path))
  commands.workdir_flag(), commands.out_flag()
  own = tmp_path / 'own.py'
  own.write_text('from lt_jax.config import base_config as get_config\n')
  parse('--config=~/own.py', '--workdir=~/runs', '--out', '~/x.csv')
  assert FLAGS.workdir == f'{tmp_path}/runs' and FLAGS.out == f'{tmp_path}/x.csv'
  with pytest.raises(UserError, match=f'{tmp_path}/images'):
    load_source('folder:~/images')
  with pytest.raises(UserError, match=f'{tmp_path}/x.npz'):
    load_source('npz:~/x.npz')


def test_a_near_miss_has_any_case():
  assert errors.suggest('LDAM_DRW', ['ce', 'ldam_drw']) == "; did you mean 'ldam_drw'?"
  assert errors.suggest('ldam', ['LDAM']) == "; did you mean 'LDAM'?"
  assert errors.suggest('zzz', []) == ''


def test_an_argument_that_is_missing_or_too_many_is_named(tmp_path):
  output = tmp_path / 'out'
  for module, given, message in (
    ('lt_jax.report.__main__', [], 'give the folder of a run or of several runs'),
    ('lt_jax.evaluate', ['--workdir=x', 'y'], "'y' is not an option: options are --"),
  ):
    assert child.run(given, output, module=module) == 2
    assert output.read_text().startswith(f'error: {message}')
