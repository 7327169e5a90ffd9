#!/usr/bin/env bash
# Figure 7: fig7.sh. Counts calls of a trace, needs no server.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need
find_data
exec "$python" "$(dirname "$here")/experiments/fig07_trace.py" --output "$output" "${data[@]}" "${more[@]}"
