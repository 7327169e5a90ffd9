#!/usr/bin/env bash
# Figure 13: fig13.sh. From what fig11a.sh left in the folder, needs no server.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need
exec "$python" "$(dirname "$here")/experiments/fig13_breakdown.py" --output "$output" "${more[@]}"
