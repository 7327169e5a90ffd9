#!/usr/bin/env bash
# The artifact's alloc.sh: machines for start_server.sh, which is run in the shell that this opens.
set -euo pipefail

fail() {
    echo "alloc.sh: $*" >&2
    exit 2
}

(($# >= 1)) || fail "usage: scripts/alloc.sh MACHINES [OPTION of salloc...]"
machines=$1
shift
[[ $machines =~ ^[1-9][0-9]*$ ]] || fail "MACHINES is $machines: give how many, 1 or more"

if ! command -v salloc >/dev/null; then
    ((machines == 1)) ||
        fail "there is no SLURM here (salloc), and $machines machines are asked for: run it where SLURM is, or use Ray (docs/cluster.md)"
    echo "alloc.sh: no SLURM here, and none needed for one machine: scripts/start_server.sh localhost ..." >&2
    exit 0
fi
options=(--nodes="$machines" --ntasks-per-node=1 --cpus-per-task="${PEFT_DIST_NODE_CPUS:-128}")
gpus=${PEFT_DIST_NODE_GPUS:-8}
if [[ $gpus != 0 ]]; then
    options+=(--gpus-per-node="$gpus")
fi
if [[ -n ${PEFT_DIST_PARTITION:-} ]]; then
    options+=(--partition="$PEFT_DIST_PARTITION")
fi
exec salloc "${options[@]}" "$@"
