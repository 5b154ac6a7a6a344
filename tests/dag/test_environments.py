"""In which conda environment a job runs: what vLLM answers has one of its own, and nothing else has that one."""

import os
import re
import subprocess

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow
# Says what Snakemake asks of conda while it plans.
CONDA = """#!/bin/sh
case "$1" in
info) echo '{"conda_version": "24.9.0", "conda_prefix": "/", "root_prefix": "/", "channels": [], "platform": "linux-64"}' ;;
--version) echo "conda 24.9.0" ;;
*) echo '{"get": {"channel_priority": "strict"}, "channel_priority": "strict"}' ;;
esac
"""
ASKED = "revision: %s, num_fewshot: 0, chat_template: false, fewshot_as_multiturn: false, system: null, limit: null" % ("a" * 40)
SERVED = f"""
device: cuda
eval:
  precision: bf16
  tasks:
    chosen: {{metric: acc, lm_eval: {{task: arc_easy, {ASKED}}}}}
    said: {{metric: "exact_match,strict-match", lm_eval: {{task: gsm8k, {ASKED}}}}}
generation: {{backend: vllm}}
"""


def planned(folder, target, *overlays) -> set[str]:
    """The environments that the jobs of a target would have."""
    (folder / "conda").write_text(CONDA)
    (folder / "conda").chmod(0o755)
    files = [str(ROOT / "config/config.yaml")]
    for n, text in enumerate(overlays):
        (folder / f"{n}.yaml").write_text(text)
        files.append(str(folder / f"{n}.yaml"))
    command = ["snakemake", "-n", target, "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder), "--cores", "2"]
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    command += ["--sdm", "conda", "--configfile", *files]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return set(re.findall(r"Conda environment \S*envs/(\w+)\.yaml will be created", done.stdout + done.stderr))


@pytest.mark.parametrize(
    ("target", "wanted"),
    [("ifeval_dpo.json", {"cuda", "vllm"}), ("said_dpo.json", {"cuda", "vllm"}), ("chosen_dpo.json", {"cuda"})],
)
def test_what_vllm_answers_runs_in_its_environment_and_nothing_else_does(target, wanted, tmp_path):
    assert planned(tmp_path, f"results/{target}", SERVED) == wanted


def test_without_it_nothing_does(tmp_path):
    assert planned(tmp_path, "results/ifeval_dpo.json") == {"cpu"}
