#!/usr/bin/env bash
# Trains on a GKE cluster created by XPK, as a JobSet:
#
#   NAME=ldam-drw CLUSTER=mine ZONE=us-west4-a BUCKET=gs://MINE \
#     IMAGE=us-docker.pkg.dev/MINE/lt_jax/lt_jax:1 \
#     launch/gke_xpk.sh --config=configs/inat18.py:ldam_drw
#
# --dry_run only prints the command.
set -euo pipefail

NAME=${NAME:?name of the workload and the run: a-z, 0-9 and -, such as ldam-drw}
CLUSTER=${CLUSTER:?name given to xpk cluster create}
ZONE=${ZONE:?zone of the cluster, such as us-west4-a}
BUCKET=${BUCKET:?gs://..., in the same region}
IMAGE=${IMAGE:?name of the image, built from launch/Dockerfile and pushed}
WORKDIR=${WORKDIR:-$BUCKET/runs/$NAME}
TFDS_DATA_DIR=${TFDS_DATA_DIR:-$BUCKET/tensorflow_datasets}
TPU_TYPE=${TPU_TYPE:-v5litepod-32}
MAX_RESTARTS=${MAX_RESTARTS:-50}  # of the JobSet, after preemptions and failures

cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh "$@"
expect_device tpu

# XPK runs the command in a subshell and forwards SIGTERM to it; exec replaces it by
# Python. XPK restarts by itself after a signal, 128 and up, including 143.
run xpk workload create --workload="$NAME" --cluster="$CLUSTER" --zone="$ZONE" \
  --tpu-type="$TPU_TYPE" --docker-image="$IMAGE" --env=TFDS_DATA_DIR="$TFDS_DATA_DIR" \
  --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 \
  --command="exec $(quoted python -m lt_jax.main "${ARGS[@]}" --workdir="$WORKDIR" \
    --distributed)"
