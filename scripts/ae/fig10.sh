#!/usr/bin/env bash
# Figure 10: fig10.sh MASTER POLICY, or with --sim. The server: start_server.sh MACHINES 1 1 8 MASTER 7 3 3 POLICY.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need MASTER POLICY
case ${rest[1]-} in
    "") system= ;;
    fcfs | merge) system=$(forms "${rest[1]}") ;;
    credit) system=$(forms dlora) ;;
    *) fail "POLICY is ${rest[1]}: give fcfs, merge or credit" ;;
esac
experiment fig10_policies.py "${rest[0]-}" "$system"
