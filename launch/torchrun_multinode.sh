#!/usr/bin/env bash
# Trains on several machines with torchrun: run the same command on each of them.
#
# usage: launch/torchrun_multinode.sh MACHINES RANKS_PER_MACHINE FIRST_MACHINE[:PORT] [options of launch/train.py]
#
#   RUN_ID         names this run: it tells it from others that meet at the same port, and the same options under the
#                  same name go on from the last checkpoint; default: none, every start is a new run
#   MAX_RESTARTS   how often all ranks start again after one has failed; default: 0
#   PYTHON         the interpreter; default: python3
#
# Every machine must reach FIRST_MACHINE at PORT (default 29400), which listens on all its interfaces.
set -euo pipefail

if [[ $# -lt 3 || ! $1 =~ ^[1-9][0-9]*$ || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    sed -n 's/^# usage/usage/p' "$0" >&2
    exit 2
fi
machines=$1 ranks=$2 first=$3
shift 3
[[ $first == *:* ]] || first=$first:29400

exec "${PYTHON:-python3}" -m torch.distributed.run \
    --nnodes "$machines" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "$first" --rdzv-id "${RUN_ID:-none}" \
    "$(dirname "$0")/train.py" "$@"
