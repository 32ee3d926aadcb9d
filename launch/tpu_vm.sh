#!/usr/bin/env bash
# Trains on a Cloud TPU slice. Run the same command again to resume, on the same slice or, after a preemption, on a
# new one.
#
#   export PROJECT=my-project ZONE=us-west4-a BUCKET=my-bucket TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite
#   launch/tpu_vm.sh [--dry-run] train --config=configs/dual_470m.py --config.mesh.fsdp=16 [--config.a.b=v ...]
#
# train ARGUMENTS   create, setup and start
# create            request the slice as a queued resource and wait for it
# setup             copy this checkout and the corpus to all workers, and install dualsm
# start ARGUMENTS   start training on all workers in the background, unless it is running; reports workers on which
#                   training ends within 30 seconds
# logs              follow the log of worker 0
# status            show the state of the queued resource and of training on each worker
# stop              save and stop training
# delete            delete the slice; the bucket is kept
#
# Environment variables (default):
# PROJECT  Google Cloud project
# ZONE     zone with slices of the type
# BUCKET   bucket for runs and corpora, without gs://
# TYPE     type of the slice, such as v5litepod-16 or v5p-128
# RUNTIME  TPU software version, such as v2-alpha-tpuv5-lite or v2-alpha-tpuv5
# NAME     name of the slice and the run (dualsm)
# CORPUS   path of the corpus in the bucket (corpora/NAME); CORPUS= copies none, for configs with several sources,
#          whose corpora are gs:// paths
# SPOT     1: spot capacity, cheap and preemptible; 0: on demand (1)
# NETWORK  network of the slice, for which `create` adds a firewall rule (the default network, which needs none)
#
# The run directory is gs://BUCKET/runs/NAME.
set -euo pipefail

die() { echo "error: launch/tpu_vm.sh: $*" >&2; exit 2; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; }
need() { for name in "$@"; do [[ ${!name:-} ]] || die "the variable $name is not set (see --help)"; done; }

dry_run=
case ${1:-} in
  --help | -h) usage; exit 0 ;;
  --dry-run) dry_run=1; shift ;;
esac
verb=${1:-}
[[ $verb ]] || die "no command; use train, create, setup, start, logs, status, stop or delete (see --help)"
shift
NAME=${NAME:-dualsm} SPOT=${SPOT:-1} NETWORK=${NETWORK:-} CORPUS=${CORPUS-corpora/${NAME:-dualsm}}
WATCH=${WATCH:-30} # seconds for which `start` watches the workers
here=$(cd "$(dirname "$0")/.." && pwd)

# Runs a command, or prints it.
run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
on_workers() { run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" "--worker=$1" "--command=$2"; }
state() {
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" '--format=value(state.state)' 2>/dev/null || true
}

# JAX's coordinator listens on port 8476 of worker 0, libtpu on the ports around it. New networks block all ports.
open_ports() {
  local rule=dualsm-$NETWORK
  if [[ ! $dry_run ]] && gcloud compute firewall-rules describe "$rule" "--project=$PROJECT" >/dev/null 2>&1; then
    return
  fi
  run gcloud compute firewall-rules create "$rule" "--project=$PROJECT" "--network=$NETWORK" \
    --allow=tcp:8470-8480 --source-tags=dualsm --target-tags=dualsm
}

create() {
  need TYPE RUNTIME
  [[ ! $NETWORK ]] || open_ports
  local now=
  [[ $dry_run ]] || now=$(state)
  case $now in
    SUSPENDED | SUSPENDING | FAILED) # preempted or never granted: replace the queued resource
      delete
      now= ;;
  esac
  if [[ ! $now ]]; then
    local options=("--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME")
    [[ $SPOT == 0 ]] || options+=(--spot)
    [[ ! $NETWORK ]] || options+=("--network=$NETWORK" --tags=dualsm)
    run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "${options[@]}"
  fi
  [[ ! $dry_run ]] || return 0
  until [[ $(state) == ACTIVE ]]; do
    echo "slice $NAME: $(state)"
    case $(state) in SUSPENDED | FAILED) die "the slice was not granted; run the same command again" ;; esac
    sleep 20
  done
}

setup() {
  need BUCKET
  local archive=/tmp/dualsm-$NAME.tar.gz
  run tar -czf "$archive" -C "$here" setup.py pyproject.toml README.md dualsm configs
  run gcloud compute tpus tpu-vm scp "$archive" "$NAME:dualsm.tar.gz" "${where[@]}" --worker=all
  # The image's Python may be older than 3.11, so uv installs one.
  on_workers all "set -e; mkdir -p dualsm corpus; tar -xzf dualsm.tar.gz -C dualsm; \
python3 -m pip install --quiet --user uv; \
python3 -m uv venv --quiet --allow-existing --python=3.11 venv; \
python3 -m uv pip install --quiet --python=venv/bin/python -e 'dualsm[tpu]'\
${CORPUS:+; gcloud storage rsync --recursive $(printf %q "gs://$BUCKET/$CORPUS") corpus}"
}

start() {
  need BUCKET
  [[ $# -gt 0 ]] || die "no arguments for start; add --config=FILE (see --help)"
  local command
  # Overrides must come after --config.
  command=$(printf '%q ' ../venv/bin/python -m dualsm.train "$@" "--workdir=gs://$BUCKET/runs/$NAME" \
    ${CORPUS:+--config.data.path=../corpus})
  on_workers all "if kill -0 \$(cat train.pid 2>/dev/null) 2>/dev/null; then echo already running; exit; fi; \
cd dualsm || exit; setsid nohup $command >>../train.log 2>&1 </dev/null & pid=\$!; echo \$pid >\$HOME/train.pid; \
for second in \$(seq $WATCH); do sleep 1; kill -0 \$pid 2>/dev/null && continue; wait \$pid && exit; status=\$?; \
echo error: \$(hostname): training ended after \$second s with status \$status:; tail -n 5 ../train.log; \
exit \$status; done >&2" || die "a worker failed to start (see above); stop the others with 'stop'"
}

delete() { run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet; }

need PROJECT ZONE
where=("--project=$PROJECT" "--zone=$ZONE")
case $verb in
  train)
    need TYPE RUNTIME BUCKET
    [[ $# -gt 0 ]] || die "no arguments for train; add --config=FILE (see --help)"
    create
    setup
    start "$@" ;;
  create) create ;;
  setup) setup ;;
  start) start "$@" ;;
  logs) on_workers 0 'tail -n 100 -F train.log' ;;
  status)
    run gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" '--format=value(state.state)'
    on_workers all "kill -0 \$(cat train.pid) 2>/dev/null && echo running || echo not running; tail -n 3 train.log" ;;
  stop) on_workers all "kill -TERM \$(cat train.pid)" ;;
  delete) delete ;;
  *) die "unknown command $verb; use train, create, setup, start, logs, status, stop or delete" ;;
esac
