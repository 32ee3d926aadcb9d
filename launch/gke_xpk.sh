#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, through xpk (pip install xpk). A preempted slice is replaced and the
# run resumes by itself; after `delete`, run the same command to resume.
#
#   export PROJECT=my-project ZONE=us-west4-a BUCKET=my-bucket CLUSTER=tpus TYPE=v5litepod-16
#   launch/gke_xpk.sh [--dry-run] cluster
#   launch/gke_xpk.sh [--dry-run] train --config=configs/dual_470m.py --config.mesh.fsdp=16 [--config.a.b=v ...]
#
# cluster           create the cluster
# train ARGUMENTS   start training as a workload
# logs              follow the log
# status            list the workloads
# stop              end the workload; it saves first
# delete            delete the cluster; what is in the bucket stays
#
# PROJECT  of Google Cloud                       TYPE      of a slice, such as v5litepod-16 or v5p-128
# ZONE     that has such slices                  SLICES    how many (1); above 1 give --config.mesh.replica=SLICES
# BUCKET   for runs and corpora, without gs://   SPOT      1: cheap and preemptible, 0: on demand (1)
# CLUSTER  its name                              IMAGE     base of the container (python:3.12)
# NAME     of workload and run (dualsm)          RESTARTS  after preemptions and failures (100)
# CORPUS   below gs://BUCKET/ (corpora/NAME)     GRACE     seconds to save in when the workload is stopped (300)
# The run is kept in gs://BUCKET/runs/NAME. A user error (status 2) ends the workload. GKE takes spot nodes after
# some 30 seconds, whatever GRACE says, so let config.checkpoint.every be a few minutes' worth of steps.
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
[[ $verb ]] || die "say what to do: cluster, train, logs, status, stop or delete (see --help)"
shift
NAME=${NAME:-dualsm} SPOT=${SPOT:-1} SLICES=${SLICES:-1} IMAGE=${IMAGE:-python:3.12} RESTARTS=${RESTARTS:-100}
GRACE=${GRACE:-300}
CORPUS=${CORPUS:-corpora/$NAME}
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

# Copies a folder of a bucket; a missing one is a user error.
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
    [[ $# -gt 0 ]] || die "nothing to train: give --config=FILE (see --help)"
    # xpk restarts a workload on statuses from 127 on by itself; 75 is a run that was stopped before its end, and
    # 1 anything but a user error, such as a lost peer.
    train=$(printf '%q ' python -m dualsm.train --stopped_status=75 "--workdir=gs://$BUCKET/runs/$NAME" \
      "$@" --config.data.path=/tmp/corpus) # after --config, which names the file that the key is of
    command="pip install --quiet -e '.[tpu]' && python -c $(printf %q "$FETCH") $(printf %q "gs://$BUCKET/$CORPUS/") \
/tmp/corpus/ && exec $train"
    run xpk workload create "${where[@]}" "--workload=$NAME" "--tpu-type=$TYPE" "--num-slices=$SLICES" \
      "--base-docker-image=$IMAGE" "--script-dir=$here" "--max-restarts=$RESTARTS" \
      --restart-on-exit-codes=1,75 "--termination-grace-period-seconds=$GRACE" "--command=$command" ;;
  logs) run kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" ;;
  status) run xpk workload list "${where[@]}" ;;
  stop) run xpk workload delete "${where[@]}" "--workload=$NAME" ;;
  delete) run xpk cluster delete "${where[@]}" ;;
  *) die "unknown verb $verb: it is cluster, train, logs, status, stop or delete" ;;
esac
