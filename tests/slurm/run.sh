#!/usr/bin/env bash
# Starts a Slurm, and on it the main job of a tiny world through profiles/slurm, disturbed in every way that a cluster has.
# One line for each thing that is proven; exit status 0: all were, 77: Slurm can't be started here. PYTHON: an interpreter with
# what envs/*.lock name (default: .venv's); the executor's plugin is installed beside it once. With --short: one
# training that is cancelled, in two minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-$PWD/.venv/bin/python}
tests/slurm/cluster.sh true
plugins=$("$python" -m tests.support.packages tests/profiles/requirements.txt)
# Each Snakemake loads every plugin that it finds, clients of clouds too, and a job starts two: they get Slurm's alone.
alone=${plugins%/*}/slurm
mkdir -p "$alone"
ln -sfn -t "$alone" "$plugins"/snakemake_executor_plugin_slurm*
PYTHONPATH=$alone exec tests/slurm/cluster.sh "$python" -m tests.slurm.trial "$@"
