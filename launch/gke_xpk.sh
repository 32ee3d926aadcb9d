#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster with xpk (pip install xpk). After a preemption the slice is replaced and
# the run resumes automatically. After `stop`, run the same command to resume; after `delete`, create the cluster first.
#
#   export PROJECT=my-project ZONE=us-west4-a BUCKET=my-bucket CLUSTER=tpus TYPE=v5litepod-16
#   launch/gke_xpk.sh [--dry-run] cluster
#   launch/gke_xpk.sh [--dry-run] train --config=configs/dual_470m.py --config.mesh.fsdp=16 [--config.a.b=v ...]
#
# cluster           create the cluster
# train ARGUMENTS   start training as a workload
# logs              follow the log
# status            list the workloads
# stop              save and end the workload
# delete            delete the cluster; the bucket is kept
#
# Environment variables (default):
# PROJECT   Google Cloud project
# ZONE      zone with slices of the type
# BUCKET    bucket for runs and corpora, without gs://
# CLUSTER   name of the cluster
# TYPE      type of a slice, such as v5litepod-16 or v5p-128
# SLICES    number of slices (1); above 1 add --config.mesh.replica=SLICES
# NAME      name of the workload and the run (dualsm)
# CORPUS    path of the corpus in the bucket (corpora/NAME); CORPUS= copies none, for configs with several sources,
#           whose corpora are gs:// paths
# SPOT      1: spot capacity, cheap and preemptible; 0: on demand (1)
# IMAGE     base image of the container (python:3.12)
# RESTARTS  maximum number of restarts after preemptions and failures (100)
# GRACE     seconds for the last save when the workload is stopped (300)
#
# The run directory is gs://BUCKET/runs/NAME. A user error (status 2) ends the workload. GKE takes spot nodes away
# after about 30 seconds regardless of GRACE, so choose config.checkpoint.every so that a checkpoint is saved every
# few minutes.
set -euo pipefail

die() { echo "error: launch/gke_xpk.sh: $*" >&2; exit 2; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; }
need() { for name in "$@"; do [[ ${!name:-} ]] || die "the variable $name is not set (see --help)"; done; }

dry_run=
case ${1:-} in
  --help | -h) usage; exit 0 ;;
  --dry-run) dry_run=1; shift ;;
esac
verb=${1:-}
[[ $verb ]] || die "no command; use cluster, train, logs, status, stop or delete (see --help)"
shift
NAME=${NAME:-dualsm} SPOT=${SPOT:-1} SLICES=${SLICES:-1} IMAGE=${IMAGE:-python:3.12} RESTARTS=${RESTARTS:-100}
GRACE=${GRACE:-300}
CORPUS=${CORPUS-corpora/$NAME}
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

# Copies a folder from a bucket; exits with status 2 if the folder does not exist.
FETCH='import fsspec, sys
files, folder = fsspec.core.url_to_fs(sys.argv[1])
if not files.isdir(folder):
    print("error: no corpus at " + sys.argv[1] + "; copy one there or set CORPUS", file=sys.stderr)
    sys.exit(2)
files.get(folder.rstrip("/") + "/", sys.argv[2], recursive=True)'

need PROJECT ZONE CLUSTER
where=("--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE")
case $verb in
  cluster)
    need TYPE
    options=("--tpu-type=$TYPE" "--num-slices=$SLICES")
    if [[ $SPOT == 0 ]]; then options+=(--on-demand); else options+=(--spot); fi
    run xpk cluster create "${where[@]}" "${options[@]}" ;;
  train)
    need TYPE BUCKET
    [[ $# -gt 0 ]] || die "no arguments for train; add --config=FILE (see --help)"
    # xpk restarts workloads by itself on exit statuses from 127 on. Status 75 is a run that was stopped before its
    # end; status 1 is any error except a user error, such as a lost peer.
    train=$(printf '%q ' python -m dualsm.train --stopped_status=75 "--workdir=gs://$BUCKET/runs/$NAME" \
      "$@" ${CORPUS:+--config.data.path=/tmp/corpus}) # overrides must come after --config
    fetch="python -c $(printf %q "$FETCH") $(printf %q "gs://$BUCKET/$CORPUS/") /tmp/corpus/ &&"
    command="pip install --quiet -e '.[tpu]' && ${CORPUS:+$fetch }exec $train"
    run xpk workload create "${where[@]}" "--workload=$NAME" "--tpu-type=$TYPE" "--num-slices=$SLICES" \
      "--base-docker-image=$IMAGE" "--script-dir=$here" "--max-restarts=$RESTARTS" \
      --restart-on-exit-codes=1,75 "--termination-grace-period-seconds=$GRACE" "--command=$command" ;;
  logs) run kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" ;;
  status) run xpk workload list "${where[@]}" ;;
  stop) run xpk workload delete "${where[@]}" "--workload=$NAME" ;;
  delete) run xpk cluster delete "${where[@]}" ;;
  *) die "unknown command $verb; use cluster, train, logs, status, stop or delete" ;;
esac
