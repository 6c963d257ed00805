#!/usr/bin/env bash
# Trains on the machines of a Slurm job: one torchrun on each, a rank a GPU.
#
# usage: sbatch [--nodes N ...] launch/slurm.sh [options of launch/train.py]
#
# From the repository's folder, which all machines must see. Options given to sbatch go before those below.
#
#   RANKS_PER_NODE   default: the GPUs Slurm gave each machine
#   MAX_RESTARTS     how often all ranks start again after one has failed; default: 0
#   PYTHON           the interpreter; default: python3
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT   seconds that ranks have to end after a signal; default: 150
#
#SBATCH --job-name=hla
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --signal=TERM@180
# (three minutes before the end: train.py ends its step, saves a checkpoint and stops)
set -euo pipefail

ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
if [[ -z ${SLURM_JOB_ID:-} || -z $ranks ]]; then
    sed -n 's/^# usage/usage/p' "$0" >&2
    echo "expected a Slurm job, and its GPUs or RANKS_PER_NODE" >&2
    exit 2
fi
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${machines%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 10000))  # two jobs may share a machine

# torchrun kills what has not ended 30 s after a signal: a long step and its checkpoint take more
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}

# srun does not take over sbatch's --cpus-per-task (since Slurm 22.05): all ranks of a machine would share one processor
# sbatch runs a copy of this script: the program is found from where it was submitted
exec srun --kill-on-bad-exit=1 --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" "${PYTHON:-python3}" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "$first:$port" --rdzv-id "$SLURM_JOB_ID" \
    "$SLURM_SUBMIT_DIR/launch/train.py" "$@"
