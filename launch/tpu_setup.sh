#!/usr/bin/env bash
# Sets up .venv on one host of a Cloud TPU, in the repository unpacked there. Running it
# again changes nothing. --dry_run only prints the commands.
set -euo pipefail

PYTHON_VERSION=${PYTHON_VERSION:-3.12}  # from uv: the image's own may be too old
JAX_EXTRA=${JAX_EXTRA:-tpu}             # cuda13 sets up a machine with GPUs

cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh "$@"

uv=$HOME/.local/bin/uv
# Ubuntu 24.04 refuses pip without this variable; with --user nothing can break.
run env PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
[[ -x .venv/bin/python ]] || run "$uv" venv --quiet --python "$PYTHON_VERSION" .venv
# The exact versions of the lock file, what JAX needs here, etils for gs://, and the
# Hugging Face hub for published weights.
run "$uv" pip install --quiet --python .venv/bin/python \
  --requirement requirements.lock "jax[$JAX_EXTRA]" 'etils[epath-gcs]' huggingface_hub
