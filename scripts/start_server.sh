#!/usr/bin/env bash
# The artifact's start_server.sh, for peft-dist: the same arguments, on one machine or on those of a SLURM allocation.
set -euo pipefail

usage() {
    cat >&2 <<'END'
usage: scripts/start_server.sh MACHINES TP REPLICAS ADAPTERS MASTER MODEL EXEC_TYPE MIGRATION_TYPE [POLICY [OPTION...]]

  MACHINES        localhost, or machines of a SLURM allocation (scripts/alloc.sh): node1,node2 or node[1-4]
  TP              GPUs of each replica (--tensor-parallel-size)
  REPLICAS        of all machines together
  ADAPTERS        how many adapters are served
  MASTER          address or name of one of the machines, where the server answers on port 8000
  MODEL           7, 13 or 70: a Llama 2 of so many billion weights
  EXEC_TYPE       1: whole merged models (vLLM); 2: one adapter at a time (PEFT); 3: dLoRA
  MIGRATION_TYPE  1: round robin; 2: proactive; 3: dLoRA
  POLICY          fcfs, merge or credit (if not given), with EXEC_TYPE 3
  OPTION          of peft-dist serve, passed on

environment: docs/cluster.md has all of it
  PEFT_DIST_MODEL    folder or hub id in place of the Llama 2
  PEFT_DIST_WEIGHTS  random: weights drawn at random, nothing is downloaded
  PEFT_DIST_ADAPTERS folder of adapters (a subfolder each); if not set, they are drawn at random
  PEFT_DIST_CACHE    where random adapters and the cluster's key are kept; on several machines: a folder they share
END
}

fail() {
    echo "start_server.sh: $*" >&2
    exit 2
}

# NAME VALUE: a whole number of 1 or more.
count() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 is $2: give a whole number of 1 or more"
}

if (($# < 8)); then
    usage
    fail "$# arguments are given, 8 are needed: see above"
fi
machines=$1 tp=$2 replicas=$3 adapters=$4 master=$5 size=$6 exec_type=$7 migration_type=$8 policy=${9-}
more=("${@:10}")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
port=${PEFT_DIST_PORT:-8000} join_port=${PEFT_DIST_JOIN_PORT:-5600} cache=${PEFT_DIST_CACHE:-$HOME/.cache/peft-dist}

count TP "$tp"
count REPLICAS "$replicas"
count ADAPTERS "$adapters"
[[ -n $machines ]] || fail "MACHINES is empty: give localhost, or machines of the allocation"
[[ -n $master ]] || fail "MASTER is empty: give the address of one of the machines, or 127.0.0.1"

case $size in
    7 | 13 | 70) ;;
    *) fail "MODEL is $size: give 7, 13 or 70, and PEFT_DIST_MODEL for any other model" ;;
esac
case $migration_type in
    1) migration=rr ;;
    2) migration=proactive ;;
    3) migration=dlora ;;
    *) fail "MIGRATION_TYPE is $migration_type: give 1 (round robin), 2 (proactive) or 3 (dLoRA)" ;;
esac
case $policy in
    "" | fcfs | merge | credit) ;;
    *) fail "POLICY is $policy: give fcfs, merge or credit; options of peft-dist serve come behind it" ;;
esac
# As in the artifact, the baselines know no policy, and none of their requests move.
case $exec_type in
    1) execution=(--exec-type vllm) baseline_migration=rr ;;
    2) execution=(--exec-type peft) baseline_migration=${migration/dlora/proactive} ;;
    3) execution=(--exec-type dlora --policy "${policy:-credit}") baseline_migration=$migration ;;
    *) fail "EXEC_TYPE is $exec_type: give 1 (vLLM), 2 (PEFT) or 3 (dLoRA)" ;;
esac
if [[ $exec_type != 3 && -n $policy ]]; then
    echo "start_server.sh: POLICY $policy is of EXEC_TYPE 3: left out" >&2
fi
if [[ $baseline_migration != "$migration" ]]; then
    echo "start_server.sh: EXEC_TYPE $exec_type moves no requests: --migration $baseline_migration" >&2
    migration=$baseline_migration
fi

[[ $exec_type != 1 ]] || ((tp == 1)) || fail "EXEC_TYPE 1 keeps whole merged models, which are not split: TP is $tp, give 1"

# Whether it can run at all, before anything is drawn or fetched for it.
nodes=()
case $machines in
    localhost | 127.0.0.1 | "$(hostname)" | "$(hostname -s)") ;;
    *)
        [[ -n ${SLURM_JOB_ID:-} ]] ||
            fail "MACHINES is $machines, and this is no SLURM allocation: run scripts/alloc.sh first, give localhost, or use Ray (docs/cluster.md)"
        for tool in srun scontrol; do
            command -v $tool >/dev/null || fail "SLURM_JOB_ID is set, and there is no $tool: run this where SLURM's commands are"
        done
        mapfile -t nodes < <(scontrol show hostnames "$machines")
        ((${#nodes[@]} > 0)) || fail "MACHINES is $machines: scontrol knows no such machines"
        ((replicas >= ${#nodes[@]})) || fail "$replicas replicas leave some of ${#nodes[@]} machines without any: name fewer machines"
        ;;
esac

peft_dist=${PEFT_DIST:-$(command -v peft-dist || true)}
[[ -n $peft_dist ]] || peft_dist=$here/../.venv/bin/peft-dist
command -v "$peft_dist" >/dev/null || fail "there is no peft-dist: pip install 'peft-dist[server]', or name it in PEFT_DIST"
python=${PEFT_DIST_PYTHON:-$(dirname "$(command -v "$peft_dist")")/python}

make_random() {
    "$python" "$here/make_random.py" "$@" || fail "make_random.py $* failed, see above; PEFT_DIST_PYTHON names the Python that runs it"
}

model=${PEFT_DIST_MODEL:-NousResearch/Llama-2-${size}b-hf}
case ${PEFT_DIST_WEIGHTS:-} in
    "") ;;
    random)
        [[ -n ${PEFT_DIST_MODEL:-} ]] || model=$(make_random base "$size" "$cache")
        execution+=(--load-format dummy)
        ;;
    *) fail "PEFT_DIST_WEIGHTS is $PEFT_DIST_WEIGHTS: leave it out, or give random" ;;
esac

if [[ -n ${PEFT_DIST_ADAPTERS:-} ]]; then
    found=()
    for config in "$PEFT_DIST_ADAPTERS"/*/adapter_config.json; do
        [[ ! -f $config ]] || found+=("$(dirname "$config")")
    done
    ((${#found[@]} >= adapters)) ||
        fail "PEFT_DIST_ADAPTERS ($PEFT_DIST_ADAPTERS) has ${#found[@]} adapters, $adapters are to be served: add some, or lower ADAPTERS"
    for folder in "${found[@]:0:adapters}"; do
        execution+=(--adapter "$(basename "$folder")=$folder")
    done
else
    rank=${PEFT_DIST_ADAPTER_RANK:-16}
    count PEFT_DIST_ADAPTER_RANK "$rank"
    folder=$cache/adapters-${model//\//_}-r$rank
    make_random adapters "$model" "$folder" --count "$adapters" --rank "$rank"
    for ((i = 0; i < adapters; i++)); do
        execution+=(--adapter "adapter$i=$folder/adapter$i")
    done
fi

serve=("$peft_dist" serve "$model" --host "$master" --port "$port" --tensor-parallel-size "$tp"
    --migration "$migration" "${execution[@]}")

if ((${#nodes[@]} == 0)); then
    exec "${serve[@]}" --replicas "$replicas" "${more[@]}"
fi

# NAME: its first address; nothing if it has none.
address_of() {
    getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }' || true
}

# The first machine serves if none is found by MASTER, and then says whether it has that address.
server=${nodes[0]}
master_address=$(address_of "$master")
for node in "${nodes[@]}"; do
    if [[ $node == "$master" || -n $master_address && $(address_of "$node") == "$master_address" ]]; then
        server=$node
        break
    fi
done

key=$cache/cluster-$SLURM_JOB_ID.json
mkdir -p "$cache"
[[ -f $key ]] || "$peft_dist" keys "$key"
# A server that fails ends the step; a worker never does.
exec srun --nodes="${#nodes[@]}" --ntasks-per-node=1 --nodelist="$machines" --kill-on-bad-exit=1 \
    "$here/slurm_node.sh" "$server" "$replicas" "$tp" "tcp://$master:$join_port" "$key" "${serve[@]}" "${more[@]}"
