#!/usr/bin/env bash
# Starts a Slurm, and on it the main job of a tiny world through profiles/slurm, disturbed in every way that a cluster has.
# One line for each thing that is proven; exit status 0: all were, 77: Slurm can't be started here.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec tests/slurm/cluster.sh "${PYTHON:-python3}" -m tests.slurm.trial
