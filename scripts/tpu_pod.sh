#!/usr/bin/env bash
# A run on a TPU pod slice: create it, install, start on all workers, follow, start again after preemption, delete.
# Never run on a TPU: none was at hand.
#
#   export TPU=afrl ZONE=us-east5-a SLICE=v5p-128 RUNTIME=v2-alpha-tpuv5 BUCKET=my-bucket
#   scripts/tpu_pod.sh create
#   scripts/tpu_pod.sh run --config=configs/afrl_qwen3_32b_to_0_6b.py --config.data_root=../bucket/data
#   scripts/tpu_pod.sh logs        # of worker 0, which speaks for all
#   scripts/tpu_pod.sh delete
#
# `run` keeps going: exit status 75 (SIGTERM came and the step is saved, or a worker was lost) and a slice that is gone
# both lead to the same command again, on a new slice if need be. A slice is deleted only when it was told to be
# preempted, terminated, suspended or failed; while nothing can be read of it, nothing is done to it. $BUCKET is mounted
# at ~/bucket on every worker: data and the run's folder lie there. SLICE counts cores for v5p (v5p-128 is 4x4x4 = 64
# chips) and chips for v5e and v6e. RUNTIME is the image, another for each chip: v2-alpha-tpuv5 for v5p,
# v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv6e for v6e; `gcloud compute tpus tpu-vm versions list --zone=$ZONE` has all.
# The project needs Python 3.11; where the image is older (Ubuntu 22.04 has 3.10) it is installed from deadsnakes.
set -euo pipefail

: "${TPU:?name of the slice}" "${ZONE:?zone}" "${BUCKET:?name of the bucket}"
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}
tpu() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }
everywhere() { tpu ssh "$TPU" --worker=all --command="$1"; }

create() {
    tpu create "$TPU" --accelerator-type="${SLICE:?such as v5p-128}" --version="$RUNTIME" ${SPOT:+--spot}
    tar -czf afrl.tar.gz --exclude=.venv --exclude=runs --exclude=.git --exclude=afrl.tar.gz .
    tpu scp afrl.tar.gz "$TPU": --worker=all
    everywhere "{ python3.11 -c 'import ensurepip' 2>/dev/null || {
            sudo add-apt-repository --yes ppa:deadsnakes/ppa &&
            sudo apt-get install --yes --quiet python3.11 python3.11-venv; }; } &&
        mkdir -p afrl && tar -xzf afrl.tar.gz -C afrl && cd afrl && python3.11 -m venv .venv &&
        .venv/bin/pip install --quiet -r requirements.txt libtpu==0.0.52 &&
        mkdir -p ~/bucket && sudo apt-get install --yes --quiet gcsfuse &&
        gcsfuse --implicit-dirs '$BUCKET' ~/bucket"
}

state() { # of the slice: ABSENT where there is none, UNREAD with the reason where nobody knows
    local why
    why=$(mktemp)
    if tpu describe "$TPU" --format='value(state)' 2>"$why"; then :
    elif grep -q NOT_FOUND "$why"; then echo ABSENT
    else cat "$why" >&2 && echo UNREAD; fi
    rm -f "$why"
}

run() {
    local now status
    while true; do
        now=$(state)
        case $now in
        READY) ;;
        PREEMPTED | TERMINATED | SUSPENDED | FAILED) delete && create ;;
        ABSENT) create ;;
        *) echo "$TPU is $now: nothing is done to it, once more in a minute" >&2 && sleep 60 && continue ;;
        esac
        status=0
        everywhere "cd afrl && AFRL_DISTRIBUTED=1 .venv/bin/python -m afrl_jax.main --workdir=../bucket/run $* \
            >> ~/afrl.log 2>&1" || status=$?
        case $status in 0 | 1 | 2) return $status ;; esac # done, failed, or wrong from the start: nothing to repeat
        echo "status $status: once more" >&2
        sleep 10
    done
}

logs() { tpu ssh "$TPU" --worker=0 --command="tail -F ~/afrl.log"; }
delete() { tpu delete "$TPU" --quiet; }

"$@"
