#!/usr/bin/env bash
# Figure 11a: fig11a.sh MASTER MIGRATION_TYPE, or with --sim. The server: start_server.sh MACHINES 1 8 32 MASTER 7 3 MIGRATION_TYPE.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need MASTER MIGRATION_TYPE
system=$(migration_type "${rest[1]-}")
experiment fig11a_migration.py "${rest[0]-}" "$system"
