#!/usr/bin/env bash
# A run on a TPU pod slice: create it, install, start on all workers, follow, start again after preemption, delete.
# Never run on a TPU: none was at hand.
#
#   export TPU=afrl ZONE=us-east5-a SLICE=v5p-128 RUNTIME=v2-alpha-tpuv5 BUCKET=my-bucket
#   scripts/tpu_pod.sh run --config=configs/afrl_qwen3_32b_to_0_6b.py --config.data_root=../bucket/data
#   scripts/tpu_pod.sh logs        # of worker 0, which speaks for all
#   scripts/tpu_pod.sh delete
#
# `run` creates the slice if there is none, starts the run or joins the one that lives, and looks at it once a minute.
# Each worker writes its exit status to gs://$BUCKET/status, and only that is believed, not what ssh says: 0 ends it, 1
# and 2 too (failed, or wrong from the start: nothing to repeat). Anything else, such as exit status 75 (SIGTERM came
# and the step is saved, or a worker was lost), a worker on which nothing lives, and a slice that is gone lead to the
# same command again, on a new slice if need be, until 5 starts one after the other left no new checkpoint or stage. A
# slice is deleted only when it was told to be preempted, terminated, suspended or failed; while nothing can be read of
# it, nothing is done to it. Where there is no capacity, it is asked for again every 5 minutes.
#
# $BUCKET is mounted at ~/bucket on every worker: data, the run's folder and compiled programs lie there. It needs a
# hierarchical namespace (`gcloud storage buckets create gs://$BUCKET --uniform-bucket-level-access
# --enable-hierarchical-namespace`), or folders are not renamed at once. SLICE counts cores for v5p (v5p-128 is 4x4x4 =
# 64 chips) and chips for v5e and v6e. RUNTIME is the image, another for each chip: v2-alpha-tpuv5 for v5p,
# v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv6e for v6e; `gcloud compute tpus tpu-vm versions list --zone=$ZONE` has all.
# The project needs Python 3.11; where the image is older (Ubuntu 22.04 has 3.10) it is installed from deadsnakes.
set -euo pipefail

: "${TPU:?name of the slice}" "${ZONE:?zone}" "${BUCKET:?name of the bucket}"
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}
tpu() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }
everywhere() { tpu ssh "$TPU" --worker=all --command="$1"; }
say() { echo "$*" >&2; }

# Every worker sees at once what another wrote: nothing that is known of files is kept.
MOUNT="mkdir -p ~/bucket
    mountpoint -q ~/bucket || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 '$BUCKET' ~/bucket
    mountpoint -q ~/bucket"

create() {
    tpu create "$TPU" --accelerator-type="${SLICE:?such as v5p-128}" --version="$RUNTIME" ${SPOT:+--spot} &&
        { gcloud storage rm "gs://$BUCKET/status/*" 2> /dev/null || :; } # of the workers of an earlier slice
}
delete() { tpu delete "$TPU" --quiet; }
logs() { tpu ssh "$TPU" --worker=0 --command="tail -F ~/afrl.log"; }

install() {
    tar -czf afrl.tar.gz --exclude=.venv --exclude=runs --exclude=.git --exclude=afrl.tar.gz . &&
    tpu scp afrl.tar.gz "$TPU": --worker=all &&
    everywhere 'set -e
        apt() { sudo apt-get -o DPkg::Lock::Timeout=600 --yes --quiet "$@"; } # a fresh machine updates itself first
        apt update
        apt install curl gnupg lsb-release software-properties-common
        from=https://packages.cloud.google.com/apt key=/usr/share/keyrings/gcsfuse.asc
        curl -fsS $from/doc/apt-key.gpg | sudo tee $key > /dev/null
        echo "deb [signed-by=$key] $from gcsfuse-$(lsb_release -cs) main" |
            sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
        python3.11 -c "import ensurepip" 2> /dev/null || sudo add-apt-repository --yes ppa:deadsnakes/ppa
        apt update
        apt install gcsfuse python3.11 python3.11-venv
        mkdir -p afrl && tar -xzf afrl.tar.gz -C afrl && cd afrl && python3.11 -m venv .venv
        .venv/bin/pip install --quiet -r requirements.txt libtpu==0.0.52
        touch installed'
}

state() { # of the slice: ABSENT where there is none, UNREAD with the reason where nobody knows
    local why
    why=$(mktemp)
    if tpu describe "$TPU" --format='value(state)' 2>"$why"; then :
    elif grep -q NOT_FOUND "$why"; then echo ABSENT
    else cat "$why" >&2 && echo UNREAD; fi
    rm -f "$why"
}

ready() { # the slice, created and installed where it has to be; fails where it cannot be made at all
    local now why
    while now=$(state); do
        case $now in
        READY)
            case $(everywhere "test -e afrl/installed && echo INSTALLED || echo MISSING") in
            *MISSING*) install && return ;;
            *INSTALLED*) return ;;
            esac
            say "$TPU cannot be reached or installed: once more in a minute" && sleep 60 ;;
        PREEMPTED | TERMINATED | SUSPENDED | FAILED) delete || sleep 60 ;;
        ABSENT)
            why=$(create 2>&1) && continue
            say "$why" && grep -qiE 'capacity|RESOURCE_EXHAUSTED|UNAVAILABLE|INTERNAL' <<<"$why" || return 1
            say "no capacity: once more in 5 minutes" && sleep 300 ;;
        *) say "$TPU is $now: nothing is done to it, once more in a minute" && sleep 60 ;;
        esac
    done
}

start() { # on all workers, where nothing lives; what ended a moment ago has its time to go
    local command
    command="cd ~/afrl && export AFRL_DISTRIBUTED=1 JAX_COMPILATION_CACHE_DIR=~/bucket/compiled"
    command="$command && .venv/bin/python -m afrl_jax.main --workdir=../bucket/run $(printf '%q ' "$@")"
    command="$command; echo \$? > ~/bucket/status/\$(hostname)"
    everywhere "$MOUNT && mkdir -p ~/bucket/status || exit 1
        flock -w 150 ~/afrl.lock rm -f ~/bucket/status/\$(hostname) || exit 0 # it lives: it is followed
        setsid flock -n ~/afrl.lock bash -c $(printf %q "$command") < /dev/null >> ~/afrl.log 2>&1 &"
}

statuses() { gcloud storage cat "gs://$BUCKET/status/*" 2> /dev/null || :; }
left() { gcloud storage ls "gs://$BUCKET/run/checkpoints/*" "gs://$BUCKET/run/stages/" 2> /dev/null || :; }

follow() { # until something ended; the verdict, empty where it ended without one
    while sleep 60; do
        if [ -n "$(statuses)" ]; then
            sleep 60 # the others end too
            statuses | grep -xE '1|2' || statuses | grep -x 0 || statuses
            return 0
        fi
        case $(state) in
        READY) if everywhere "flock -n ~/afrl.lock echo ENDED" 2> /dev/null | grep ENDED > /dev/null; then
                sleep 60 && [ -n "$(statuses)" ] || return 0
            fi ;;
        UNREAD) ;;
        *) return 0 ;;
        esac
    done
}

run() {
    local before now idle=0 verdict
    before=$(left)
    while true; do
        ready || return 1
        start "$@" || say "not started on all workers, or ssh broke: what lives is followed"
        verdict=$(follow)
        verdict=${verdict%%$'\n'*}
        case $verdict in 0 | 1 | 2) return "$verdict" ;; esac
        now=$(left)
        if [ "$now" = "$before" ]; then idle=$((idle + 1)); else idle=0; fi
        before=$now
        [ "$idle" -lt 5 ] || { say "5 starts without a new checkpoint: given up"; return 1; }
        say "ended with status ${verdict:-unknown}: once more" && sleep 10
    done
}

"$@"
