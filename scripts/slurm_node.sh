#!/usr/bin/env bash
# One machine of a SLURM step, run by start_server.sh: the one named SERVER serves, replicas of the others join it.
set -euo pipefail

if (($# < 7)); then
    echo "usage: slurm_node.sh SERVER REPLICAS TP ADDRESS KEY PEFT_DIST serve OPTION... (start_server.sh runs it under srun)" >&2
    exit 2
fi
server=$1 replicas=$2 tp=$3 address=$4 key=$5 peft_dist=$6
serve=("${@:6}")
node=${SLURM_PROCID:?is set by srun} nodes=${SLURM_NTASKS:?is set by srun} name=${SLURMD_NODENAME:?is set by srun}
share=$((replicas / nodes + (node < replicas % nodes ? 1 : 0)))

if [[ $name == "$server" ]]; then
    master=${address#tcp://}
    master=${master%:*}
    resolved=$(getent ahostsv4 "$master" | awk 'NR == 1 { print $1 }' || true)
    if [[ -z $resolved || $resolved != 127.* && " $(hostname -I) " != *" $resolved "* ]]; then
        echo "start_server.sh: MASTER is $master, but $name has $(hostname -I): give one of these, or what another machine is called" >&2
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
