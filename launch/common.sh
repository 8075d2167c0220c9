# shellcheck shell=bash
# Sourced by the scripts beside it, with their arguments. Takes out --dry_run and leaves
# the rest, which is for python, in ARGS.

DRY_RUN=
ARGS=()
for argument in "$@"; do
  if [[ $argument == --dry_run ]]; then DRY_RUN=1; else ARGS+=("$argument"); fi
done

# Has python refuse to train on another kind of device, as it would on the CPU of a
# machine whose driver is broken; a --config.device among the arguments takes its place.
expect_device() {
  [[ " ${ARGS[*]}" == *' --config.device'[=\ ]* ]] || ARGS+=("--config.device=$1")
}

# Prints words on one line, quoted so that a shell reads the same words back.
quoted() {
  local words
  printf -v words '%q ' "$@"
  printf '%s\n' "${words% }"
}

# Prints a command and, unless this is a dry run, runs it.
run() {
  printf '+ %s\n' "$(quoted "$@")"
  [[ $DRY_RUN ]] || "$@"
}

# Runs the step of a SLURM job and ends the job. Where running again helps, the job goes
# back into the queue: after 75, a passing failure, and after a signal, 128 and more,
# among them 143, stopped as asked and saved. A cancelled job does not come back, for
# then SLURM ends this shell too.
run_step() {
  local code=0 job=${SLURM_JOB_ID:-JOB}
  if [[ ${SLURM_ARRAY_JOB_ID:-} ]]; then # the plain number may mean the whole array
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  fi
  run "$@" || code=$?
  [[ ! $DRY_RUN ]] || echo "# after 75, or 128 and more: scontrol requeue $job"
  if ((code == 75 || code >= 128)) && ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
    run scontrol requeue "$job"
  fi
  exit "$code"
}
