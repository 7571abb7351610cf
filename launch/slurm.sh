#!/usr/bin/env bash
# Trains on the nodes of a SLURM job, one process a node (each uses all of its node's GPUs):
#
#   sbatch --nodes=2 --gpus-per-node=4 launch/slurm.sh configs/unet_hippocampus.py --out runs/h
#
# Time-out and preemption send SIGTERM to medseg two minutes early: it saves, ends with 143, and the job queues up again.
# A lost process or node ends the others, and the job queues up again too; an explained problem (1, 2) ends the job, as
# does scancel. RUN and the folder of sbatch must lie on a file system that all nodes share. MEDSEG is how medseg is
# called on a node; RESTARTS, how often a job may come back.
#
#SBATCH --job-name=medseg
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=medseg-%j.log
set -uo pipefail

[ $# -gt 0 ] || { echo "usage: sbatch [options] $0 CONFIG --out RUN [options of medseg train]" >&2; exit 2; }
[ -n "${SLURM_JOB_ID:-}" ] || { echo "$0: no SLURM job here; start it with sbatch" >&2; exit 2; }
restarts=${SLURM_RESTART_COUNT:-0}
echo "job $SLURM_JOB_ID on ${SLURM_JOB_NUM_NODES:-1} node(s), start $((restarts + 1))"

# Preemption and scancel may tell this shell as well: it waits for srun all the same.
trap 'echo "SIGTERM: medseg has saved"' TERM

# Since SLURM 22.05 srun does not ask sbatch how many CPUs a task has.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# srun ends with the highest code of all tasks; those that die with a task that explains a problem (1, 2; 126 and 127:
# no medseg there) have higher ones. So it writes its code down. Its shell, too, hears SIGTERM, and waits for medseg.
explained=$PWD/medseg-$SLURM_JOB_ID.explained
: > "$explained"
# shellcheck disable=SC2016  # the tasks' words
task='trap : TERM; "${@:2}"; code=$?; case $code in 1 | 2 | 126 | 127) echo $code >> "$1" ;; esac; exit $code'
code=0
# shellcheck disable=SC2086  # MEDSEG may be several words
srun --kill-on-bad-exit=1 bash -c "$task" task "$explained" ${MEDSEG:-medseg} train "$@" || code=$?
problem=$(head -n 1 "$explained")
rm -f "$explained"

if [ "$code" = 0 ]; then
    echo "trained"
elif [ -n "$problem" ]; then
    code=$problem
    echo "medseg explains the problem above; not queued again" >&2
# A job cancelled is COMPLETING until this script ends; so is one whose two minutes did not suffice, for another reason.
elif job=$(scontrol show job "$SLURM_JOB_ID") &&
    [[ $job =~ JobState=(CANCELLED|COMPLETING) && $job != *Reason=TimeLimit* ]]; then
    echo "ended with $code; cancelled, so not queued again" >&2
elif [ "$restarts" -ge "${RESTARTS:-20}" ]; then
    echo "ended with $code after $restarts restarts; not queued again" >&2
else
    echo "ended with $code; queued again, the run goes on from its last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
