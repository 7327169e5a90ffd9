#!/usr/bin/env bash
# Figure 11b: fig11b.sh MASTER MIGRATION_TYPE, or with --sim. The server: start_server.sh MACHINES 1 8 32 MASTER 7 3 MIGRATION_TYPE.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need MASTER MIGRATION_TYPE
system=$(migration_type "${rest[1]-}")
experiment fig11b_lengths.py "${rest[0]-}" "$system"
