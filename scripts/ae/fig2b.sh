#!/usr/bin/env bash
# Figure 2b: fig2b.sh MASTER, or fig2b.sh --sim. The server: start_server.sh MACHINES 1 8 32 MASTER 7 1 3.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need MASTER
system=
[[ -n $simulate ]] || system=vllm
experiment fig02b_queueing.py "${rest[0]-}" "$system"
