#!/usr/bin/env bash
# Figure 5: figure5.sh. Measures on this machine, needs no server.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need
exec "$python" "$(dirname "$here")/experiments/fig05_operators.py" --output "$output" "${more[@]}"
