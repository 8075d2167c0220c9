#!/usr/bin/env bash
# Trains on a Cloud TPU: requests it, waits, sets up and runs on every host, and deletes
# it. After a preemption it deletes what is left and requests a new one; the run resumes
# from its checkpoint in the bucket. It runs the last commit. Run this from a machine
# that stays on:
#
#   NAME=ldam-drw ZONE=us-west4-a BUCKET=gs://MINE launch/tpu_queued_resource.sh \
#     --config=configs/inat18.py:ldam_drw
#
# --dry_run only prints the commands.
set -euo pipefail

NAME=${NAME:?name of the TPU and the run, such as ldam-drw}
ZONE=${ZONE:?zone of the TPU, such as us-west4-a}
BUCKET=${BUCKET:?gs://..., in the same region}
WORKDIR=${WORKDIR:-$BUCKET/runs/$NAME}
TFDS_DATA_DIR=${TFDS_DATA_DIR:-$BUCKET/tensorflow_datasets}
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-32}
RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}  # depends on the type
SPOT=${SPOT-1}                      # empty: never preempted, at full price
KEEP=${KEEP-}                       # 1: keep the TPU, and its bill, when this ends
MAX_ATTEMPTS=${MAX_ATTEMPTS:-10}    # to get one TPU, or to train on it
POLL_SECONDS=${POLL_SECONDS:-60}

cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh "$@"
expect_device tpu

code_file=${TMPDIR:-/tmp}/lt_jax-$NAME.tar.gz

create() {
  run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" \
    --zone="$ZONE" --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION" ${SPOT:+--spot}
}

delete() {
  run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

# Prints the state of the queued resource or, if that is ACTIVE, of its TPU.
state() {
  local queued tpu
  queued=$(gcloud compute tpus queued-resources list --zone="$ZONE" \
    --filter="name~/$NAME\$" --format='value(state.state)') || return
  if [[ $queued == ACTIVE ]]; then
    tpu=$(gcloud compute tpus tpu-vm list --zone="$ZONE" \
      --filter="name~/$NAME\$" --format='value(state)') || return
    queued=${tpu:-DELETED}
  fi
  echo "$queued"
}

on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

setup() {
  run gcloud compute tpus tpu-vm scp "$code_file" "$NAME:lt_jax.tar.gz" \
    --zone="$ZONE" --worker=all &&
    on_all_hosts 'tar -xzf lt_jax.tar.gz && lt_jax/launch/tpu_setup.sh'
}

# The lock waits for a run that a broken connection left behind.
train() {
  on_all_hosts "cd lt_jax && $(quoted env TFDS_DATA_DIR="$TFDS_DATA_DIR" \
    flock --close /tmp/lt_jax.lock .venv/bin/python -m lt_jax.main \
    "${ARGS[@]}" --workdir="$WORKDIR" --distributed)"
}

attempt() {
  ((++attempts <= MAX_ATTEMPTS)) || { echo 'giving up'; exit "$code"; }
}

run git archive --prefix=lt_jax/ --output="$code_file" HEAD
if [[ $DRY_RUN ]]; then
  create
  echo '# once it is ready, and again after a temporary failure:'
  setup
  train
  echo '# at the end; also after a preemption, before it is created again:'
  delete
  exit
fi

found=$(state)  # fails on a wrong login, project or zone, before there is a TPU to delete
[[ $KEEP ]] || trap 'delete || true' EXIT
[[ $found ]] || create
attempts=0
code=1
before=
while true; do
  now=$(state) || now=UNKNOWN
  [[ $now == "$before" ]] || echo "$(date '+%F %T') ${now:-absent}"
  before=$now
  case $now in
    '')
      attempt
      create || true ;;
    READY)
      attempt
      if setup; then
        code=0
        train || code=$?
        case $code in 0 | 2 | 3) exit "$code" ;; esac # finished; a mistake; diverged
      fi ;;
    FAILED)
      attempt
      delete || true ;;
    SUSPENDED | PREEMPTED | STOPPED | TERMINATED | DELETED)
      attempts=0
      delete || true ;;
  esac
  sleep "$POLL_SECONDS"
done
