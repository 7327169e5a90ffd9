#!/usr/bin/env bash
# One machine of a SLURM step, run by start_server.sh: the first one serves, and replicas of the others join it.
set -euo pipefail

if (($# < 6)); then
    echo "usage: slurm_node.sh REPLICAS TP ADDRESS KEY PEFT_DIST serve OPTION... (start_server.sh runs it under srun)" >&2
    exit 2
fi
replicas=$1 tp=$2 address=$3 key=$4 peft_dist=$5
serve=("${@:5}")
node=${SLURM_PROCID:?is set by srun} nodes=${SLURM_NTASKS:?is set by srun}
share=$((replicas / nodes + (node < replicas % nodes ? 1 : 0)))

if ((node == 0)); then
    master=${address#tcp://}
    master=${master%:*}
    resolved=$(getent ahostsv4 "$master" | awk 'NR == 1 { print $1 }' || true)
    if [[ -z $resolved || $resolved != 127.* && " $(hostname -I) " != *" $resolved "* ]]; then
        echo "start_server.sh: MASTER is $master, but $(hostname), the first machine, has $(hostname -I): give one of these" >&2
        exit 2
    fi
    exec "${serve[@]}" --replicas "$share" --listen "$address" --cluster-key "$key"
fi

# The GPUs of this machine, in turn, tp for each replica.
gpus=()
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null; then
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
fi
groups=$((${#gpus[@]} / tp))

workers=()
end() {
    kill -TERM "${workers[@]}" 2>/dev/null || true
}
trap end TERM INT
for ((i = 0; i < share; i++)); do
    if ((groups > 0)); then
        mine=("${gpus[@]:i % groups * tp:tp}")
        CUDA_VISIBLE_DEVICES=$(
            IFS=,
            echo "${mine[*]}"
        ) "$peft_dist" worker --join "$address" --cluster-key "$key" &
    else
        "$peft_dist" worker --join "$address" --cluster-key "$key" &
    fi
    workers+=($!)
done
# The status of one machine's replicas is not that of the server, which goes on without them.
for worker in "${workers[@]}"; do
    status=0
    wait "$worker" || status=$?
    # A signal for this script interrupts the wait, not the worker, which moves its requests away first.
    while ((status > 128)) && kill -0 "$worker" 2>/dev/null; do
        status=0
        wait "$worker" || status=$?
    done
    ((status == 0)) || echo "start_server.sh: a worker of $(hostname) ended with status $status" >&2
done
