# shellcheck shell=bash
# The other scripts source this file with their arguments. It handles --dry_run and puts
# the rest, which is for Python, into ARGS.

DRY_RUN=
ARGS=()
for argument in "$@"; do
  if [[ $argument == --dry_run ]]; then DRY_RUN=1; else ARGS+=("$argument"); fi
done

# Makes Python refuse to train on another kind of device, such as the CPU of a machine
# with a broken driver. A --config.device among the arguments takes precedence.
expect_device() {
  [[ " ${ARGS[*]}" == *' --config.device'[=\ ]* ]] || ARGS+=("--config.device=$1")
}

# Prints words on one line, quoted so that a shell reads them back unchanged.
quoted() {
  local words
  printf -v words '%q ' "$@"
  printf '%s\n' "${words% }"
}

# Prints a command and runs it, unless this is a dry run.
run() {
  printf '+ %s\n' "$(quoted "$@")"
  [[ $DRY_RUN ]] || "$@"
}

# Runs the step of a SLURM job and ends the job. Requeues the job where a rerun can help:
# after 75, a temporary failure, and after a signal, 128 and up. That includes 143, asked
# to stop and saved. A cancelled job is not requeued, because SLURM ends this shell too.
run_step() {
  local code=0 job=${SLURM_JOB_ID:-JOB}
  if [[ ${SLURM_ARRAY_JOB_ID:-} ]]; then # the plain number can mean the whole array
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  fi
  run "$@" || code=$?
  [[ ! $DRY_RUN ]] || echo "# after 75, or 128 and up: scontrol requeue $job"
  if ((code == 75 || code >= 128)) && ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
    run scontrol requeue "$job"
  fi
  exit "$code"
}
