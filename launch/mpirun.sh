#!/usr/bin/env bash
# Trains over the ranks of mpirun (MPICH or Open MPI): ranks meet over MPI, then work over NCCL or gloo.
#
# usage: launch/mpirun.sh RANKS [options of launch/train.py]
#
#   HOSTS=first:8,second:8   machines and the ranks on each; default: all on this one
#   PYTHON, MPIRUN           the interpreter and launcher; default: python3 and mpirun of the PATH
#   MASTER_ADDR              the first machine's name for torch, where it is not what `hostname` says
#
# `python -m mpi4py`, not plain python: an exception on one rank then ends all.
set -euo pipefail

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    sed -n 's/^# usage/usage/p' "$0" >&2
    exit 2
fi
ranks=$1
shift
mpirun=${MPIRUN:-mpirun}

options=(-n "$ranks")
if [[ $("$mpirun" --version 2>/dev/null) == *"Open MPI"* ]]; then
    options+=(--bind-to none)  # ranks have threads, and are not pinned to a core each
    [[ -n ${MASTER_ADDR:-} ]] && options+=(-x MASTER_ADDR)
    [[ -n ${HOSTS:-} ]] && options+=(--host "$HOSTS")
elif [[ -n ${HOSTS:-} ]]; then
    options+=(-hosts "$HOSTS")
fi

exec "$mpirun" "${options[@]}" "${PYTHON:-python3}" -m mpi4py "$(dirname "$0")/train.py" "$@"
