#!/usr/bin/env bash
# Trains with several processes on this machine, as on a cluster. Run the same command again to resume.
#
#   PROCESSES=2 DEVICES=4 launch/local.sh [--dry-run] --config=configs/tiny.py --workdir=runs/two [--config.a.b=v ...]
#
# Environment variables (default):
# PROCESSES  number of processes (2)
# PLATFORM   cpu, or cuda with one GPU per process (cpu)
# DEVICES    number of simulated CPU devices per process (1)
# PORT       port of the coordinator (a free port)
# PYTHON     Python interpreter (python)
set -euo pipefail

die() { echo "error: launch/local.sh: $*" >&2; exit 2; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; }

PROCESSES=${PROCESSES:-2} PLATFORM=${PLATFORM:-cpu} DEVICES=${DEVICES:-1} PYTHON=${PYTHON:-python}
dry_run=
case ${1:-} in
  --help | -h) usage; exit 0 ;;
  --dry-run) dry_run=1; shift ;;
esac
[[ $PROCESSES =~ ^[1-9][0-9]*$ ]] || die "PROCESSES=$PROCESSES must be a positive number"
[[ $DEVICES =~ ^[1-9][0-9]*$ ]] || die "DEVICES=$DEVICES must be a positive number"
[[ $PLATFORM == cpu || $PLATFORM == cuda ]] || die "PLATFORM=$PLATFORM must be cpu or cuda"
[[ $# -gt 0 ]] || die "no arguments; add --config=FILE --workdir=DIR (see --help)"

free_port() {
  "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
if [[ ! ${PORT:-} ]]; then
  if [[ $dry_run ]]; then PORT=12345; else PORT=$(free_port); fi
fi

# Sets the array `command` to the command of process $1.
set_command() {
  command=(env "JAX_PLATFORMS=$PLATFORM")
  if [[ $PLATFORM == cpu ]]; then
    command+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES")
  else
    command+=("JAX_LOCAL_DEVICE_IDS=$1")
  fi
  command+=("$PYTHON" -m dualsm.train "--coordinator=127.0.0.1:$PORT" "--processes=$PROCESSES" "--process_id=$1")
  command+=("${arguments[@]}")
}

arguments=("$@")
pids=()
signal_all() { for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done; }
trap 'signal_all TERM' TERM INT  # JAX stops all processes after the same step
trap 'signal_all KILL' EXIT

for ((i = 0; i < PROCESSES; i++)); do
  set_command "$i"
  if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}" &
    pids+=($!)
  fi
done

# Waits for all processes. After a failure, kills the others if they do not end within 30 seconds.
status=0 deadline=
running=("${!pids[@]}")
while [[ ${#running[@]} -gt 0 ]]; do
  left=()
  for i in "${running[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then
      left+=("$i")
    else
      code=0
      wait "${pids[i]}" || code=$?
      if [[ $code -ne 0 && $status -eq 0 ]]; then
        echo "launch/local.sh: process $i of $PROCESSES exited with status $code; stopping the others" >&2
        status=$code deadline=$((SECONDS + 30))
      fi
    fi
  done
  running=(${left[@]+"${left[@]}"})
  if [[ $deadline && $SECONDS -ge $deadline ]]; then signal_all KILL; fi
  if [[ ${#running[@]} -gt 0 ]]; then sleep 0.2; fi
done
exit "$status"
