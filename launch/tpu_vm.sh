#!/usr/bin/env bash
# A TPU slice of Google Cloud, from nothing to a trained run, from a machine with gcloud and this repository:
#
#   export NAME=unet ZONE=us-west4-a TYPE=v5litepod-16 SHARE=10.0.0.2:/runs
#   launch/tpu_vm.sh train configs/unet_hippocampus.py --data share/data/hippocampus --out share/runs/h
#   launch/tpu_vm.sh stop      # saves, and ends the training
#   launch/tpu_vm.sh status
#   launch/tpu_vm.sh delete    # it costs until then
#
# NAME    of the queued resource and of its node
# ZONE    where
# TYPE    accelerator type, as `gcloud compute tpus accelerator-types list` names them
# SHARE   host:/export of an NFS server (Filestore), mounted as share/ beside configs/ on all workers: data and RUN lie there
# IMAGE   runtime version (default: by TYPE)
# SPOT    1 for preemptible chips (cheaper, taken away at any time)
# STARTS  how often to start before giving up (default 20)
#
# train creates the slice, installs and starts. When a worker dies, the others end by themselves; when the slice is
# taken away, another one is asked for. Then the same command starts again, and the run goes on from its last
# checkpoint. An explained problem (exit codes 1 and 2) ends it.
set -euo pipefail

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
}

say() { echo "[launcher] $*"; }

tpus() { gcloud compute tpus "$@" --zone="$ZONE"; }

on_all() { tpus tpu-vm ssh "$NAME" --worker=all --command="$1"; }

state() { tpus queued-resources describe "$NAME" --format='value(state.state)' 2> /dev/null || echo NONE; }

image() {
    case $TYPE in
        v5lite* | v5e*) echo v2-alpha-tpuv5-lite ;;
        v5p*) echo v2-alpha-tpuv5 ;;
        v6e*) echo v2-alpha-tpuv6e ;;
        *) echo tpu-ubuntu2204-base ;;
    esac
}

# Returns once the slice is there.
create() {
    local now
    now=$(state)
    case $now in
        SUSPENDED | SUSPENDING | FAILED)
            say "the slice is $now: asking for another one"
            tpus queued-resources delete "$NAME" --force --quiet || return
            now=NONE
            ;;
    esac
    if [ "$now" = NONE ]; then
        tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
            --runtime-version="${IMAGE:-$(image)}" ${SPOT:+--spot} || return
    fi
    until now=$(state) && [ "$now" = ACTIVE ]; do
        say "waiting for $TYPE in $ZONE: $now"
        case $now in SUSPENDED | SUSPENDING | FAILED) return 1 ;; esac
        sleep "${POLL:-30}"
    done
}

# Puts the files of the last commit and their packages on all workers, unless they are there.
install() {
    local commit archive code=0
    commit=$(git rev-parse HEAD) || return
    if on_all "test -e medseg_jax/.installed-$commit"; then return; fi
    say "installing commit $commit on all workers"
    archive=$(mktemp -d) || return
    git archive --format=tar.gz --output="$archive/medseg_jax.tar.gz" HEAD &&
        tpus tpu-vm scp "$archive/medseg_jax.tar.gz" "$NAME:" --worker=all &&
        on_all "set -e
            mkdir -p medseg_jax && rm -f medseg_jax/.installed-*
            tar -xzf medseg_jax.tar.gz -C medseg_jax && cd medseg_jax
            python3 -m pip install -q --user uv && python3 -m uv venv -q --allow-existing --python 3.12
            python3 -m uv pip install -q '.[tpu]' && touch .installed-$commit" || code=$?
    rm -r "$archive"
    return $code
}

# How pkill finds medseg: by the first words of its interpreter, for the shells around it speak of medseg, too.
MEDSEG='^[^ ]*python[^ ]* [^ ]*bin/medseg'

# Ends what an earlier start has left, on all workers before any of them starts, and forgets that it was to stop.
sweep() { on_all "rm -f medseg_jax/.stop; pkill -KILL -f '$MEDSEG' || true"; }

# All workers save and end. The shells that wait for medseg go on, and hand on its exit code.
stop() { on_all "touch medseg_jax/.stop; pkill -TERM -f '$MEDSEG' || true"; }

# Mounts the share and runs the same command on all workers, each of which asks its metadata server who it is.
# Exit codes 1 and 2 of medseg come back as 101 and 102, since gcloud ends with 1 whatever happens to itself. That
# medseg was stopped and has saved (143) is the end only if we asked for it; else the machine is being taken away. A
# worker whose connection breaks is told all this once more by gcloud: unless it was to stop, it starts afresh.
start() {
    on_all "set -e
        trap : TERM
        cd medseg_jax && mkdir -p share
        [ ! -e .stop ] || exit 143
        pkill -KILL -f '$MEDSEG' || true
        mountpoint -q share || sudo mount -t nfs -o hard $(printf %q "$SHARE") share
        about() { curl -sf -H 'Metadata-Flavor: Google' \
            http://metadata.google.internal/computeMetadata/v1/instance/attributes/\$1; }
        workers=\$(about worker-network-endpoints) commas=\${workers//[^,]/} first=\${workers%%,*}
        if [ -n \"\$commas\" ]; then
            export COORDINATOR_ADDRESS=\${first##*:}:8476 NUM_PROCESSES=\$((\${#commas} + 1))
            export PROCESS_ID=\$(about agent-worker-number)
        fi
        .venv/bin/medseg train$(printf ' %q' "$@") || code=\$?
        case \${code:=0} in
            1 | 2) exit 10\$code ;;
            143) [ -e .stop ] && exit 143 || exit 75 ;;
            *) exit \$code ;;
        esac"
}

train() {
    local attempt code
    for ((attempt = 1; attempt <= ${STARTS:-20}; attempt++)); do
        say "start $attempt of ${STARTS:-20}"
        code=0
        create && install && sweep && start "$@" || code=$?
        case $code in
            0) say "trained" && return ;;
            101 | 102) say "medseg explains the problem above; not started again" && return $((code - 100)) ;;
            143) say "stopped and saved" && return 143 ;;
        esac
        say "ended with $code; the run goes on from its last checkpoint"
        sleep "${POLL:-30}"
    done
    return "$code"
}

[ $# -gt 0 ] || usage
: "${NAME:?}" "${ZONE:?}" "${TYPE:?an accelerator type, such as v5litepod-16}"
verb=$1
shift
case $verb in
    train)
        [ $# -gt 0 ] || usage
        : "${SHARE:?host:/export that all workers can mount}"
        train "$@"
        ;;
    create) create && install ;;
    stop) stop ;;
    status) state ;;
    delete) tpus queued-resources delete "$NAME" --force --quiet ;;
    *) usage ;;
esac
