"""profiles/slurm on a real Slurm of one node: tests/slurm/run.sh. And what a Slurm that signals one process alone must reach."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

# A job's Snakemake in small: it hears SIGTERM, and waits for its step.
SNAKEMAKE = """
import signal, subprocess, sys
from workflow_scripts.plumbing import signals
signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
if sys.argv[1] != "without": signals.pass_on(lambda: sys.argv[1] == "wanted")
step = subprocess.Popen([sys.executable, "-c", '''
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("ready", flush=True)
time.sleep(1.5)
'''])
sys.exit(step.wait())
"""


@pytest.mark.parametrize("how, code", [("wanted", 143), ("unwanted", 0), ("without", 0)])
def test_sigterm_for_the_parent_alone_reaches_the_step_only_where_it_is_passed_on(how, code):
    with subprocess.Popen([sys.executable, "-c", SNAKEMAKE, how], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "heard\n"
        assert process.wait() == code


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--short"], pytest.param([], marks=pytest.mark.long)], ids=["short", "full"])
def test_the_chain_on_a_slurm_that_disturbs_it(capfd, how):
    started = time.monotonic()
    done = subprocess.run(["tests/slurm/run.sh", *how], cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}, timeout=850)
    said = capfd.readouterr()
    with capfd.disabled():
        print(f"\n{said.out}{time.monotonic() - started:.0f} s")
    if done.returncode == 77:
        pytest.skip(said.err.strip().splitlines()[-1])
    assert done.returncode == 0, (said.out + said.err)[-5000:]
