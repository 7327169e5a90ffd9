#!/usr/bin/env bash
# Figure 9, MAF1, 70b: fig9_maf1_70b.sh MASTER EXEC_TYPE, or with --sim. The server: start_server.sh MACHINES 4 8 32 MASTER 70 EXEC_TYPE 3.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need MASTER EXEC_TYPE
system=$(exec_type "${rest[1]-}")
experiment fig09_end_to_end.py "${rest[0]-}" "$system" --panels maf1_70b
