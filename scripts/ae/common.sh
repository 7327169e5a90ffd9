# Sourced by the others: from the seed's arguments to those of scripts/experiments.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PEFT_DIST_PYTHON:-}
if [[ -z $python ]]; then
    python=$here/../../.venv/bin/python
    [[ -x $python ]] || python=python3
fi
output=${PEFT_DIST_OUTPUT:-.}
scale=${PEFT_DIST_SCALE:-paper}
simulate=
rest=()
more=()
for argument in "$@"; do
    case $argument in
        --sim) simulate=1 ;;
        --*) more+=("$argument") ;;
        *) if ((${#more[@]})); then more+=("$argument"); else rest+=("$argument"); fi ;;
    esac
done

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# WORDS...: what the arguments are; without --sim all of them are needed.
need() {
    if [[ -z $simulate ]] && ((${#rest[@]} != $#)); then
        fail "${#rest[@]} arguments are given: give $* (a server that start_server.sh started), or --sim"
    fi
    ((${#rest[@]} <= $#)) || fail "${#rest[@]} arguments are given, $# are known: $*"
}

# Data is looked for where the artifact's guide puts it.
find_data() {
    data=()
    [[ ! -d ~/maf1 ]] || data+=(--maf1 ~/maf1)
    [[ ! -d ~/maf2 ]] || data+=(--maf2 ~/maf2)
    local sharegpt=~/ShareGPT_V3_unfiltered_cleaned_split.json
    local tokenizer=${PEFT_DIST_TOKENIZER:-hf-internal-testing/llama-tokenizer}
    [[ ! -f $sharegpt ]] || data+=(--sharegpt "$sharegpt" --tokenizer "$tokenizer")
    ((${#data[@]})) || echo "$(basename "$0"): there is no ~/maf1, ~/maf2 or $sharegpt: the load is synthetic" >&2
}

# SCRIPT MASTER SYSTEM OPTIONS...: run an experiment; an empty SYSTEM simulates all.
experiment() {
    local script=$1 master=$2 system=$3
    shift 3
    local where=()
    [[ -n $simulate ]] || where=(--server "http://$master:${PEFT_DIST_PORT:-8000}")
    [[ -z $system ]] || where+=(--systems "$system")
    find_data
    exec "$python" "$(dirname "$here")/experiments/$script" \
        "${where[@]}" --scale "$scale" --output "$output" "${data[@]}" "$@" "${more[@]}"
}

# SYSTEM: what is run of it. A live server has our form (fair, or as it serves here), a simulation the artifact's too.
forms() {
    echo "$1${simulate:+,$1-artifact}"
}

# EXEC_TYPE: the systems' names in results.
exec_type() {
    case ${1:-} in
        "") ;;
        1) forms vllm ;;
        2) forms peft ;;
        3) forms dlora ;;
        *) fail "EXEC_TYPE is $1: give 1 (vLLM), 2 (PEFT) or 3 (dLoRA)" ;;
    esac
}

migration_type() {
    case ${1:-} in
        "") ;;
        1) forms rr ;;
        2) forms proactive ;;
        3) forms dlora ;;
        *) fail "MIGRATION_TYPE is $1: give 1 (round robin), 2 (proactive) or 3 (dLoRA)" ;;
    esac
}
