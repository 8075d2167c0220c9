#!/usr/bin/env bash
# Trains on this machine, on all its devices:
#
#   launch/local.sh --config=configs/digits_lt.py:ldam_drw --workdir=runs/ldam_drw
#
# --dry_run only prints the command.
set -euo pipefail

PYTHON=${PYTHON:-.venv/bin/python}  # created by `make`
# export TFDS_DATA_DIR=/data/tensorflow_datasets

cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh "$@"

run exec "$PYTHON" -m lt_jax.main "${ARGS[@]}"
