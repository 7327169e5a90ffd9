#!/usr/bin/env bash
# Figure 9, MAF1, 7b: fig9_maf1_7b.sh MASTER EXEC_TYPE, or with --sim. The server: start_server.sh MACHINES 1 32 128 MASTER 7 EXEC_TYPE 3.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need MASTER EXEC_TYPE
system=$(exec_type "${rest[1]-}")
experiment fig09_end_to_end.py "${rest[0]-}" "$system" --panels maf1_7b
