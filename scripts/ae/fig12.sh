#!/usr/bin/env bash
# Figure 12: fig12.sh MASTER EXEC_TYPE ADAPTERS, or with --sim. The server: start_server.sh MACHINES 1 8 ADAPTERS MASTER 7 EXEC_TYPE 3.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need MASTER EXEC_TYPE ADAPTERS
system=$(exec_type "${rest[1]-}")
number=()
[[ -z ${rest[2]-} ]] || number=(--adapters "${rest[2]}")
experiment fig12_adapters.py "${rest[0]-}" "$system" "${number[@]}"
