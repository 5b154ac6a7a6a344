"""Where and when a step ran: git commit, packages, host, time, peak memory. Goes to run.json, which is never an input.

Plumbing: decides no number.
"""

import os
import platform
import resource
import socket
import subprocess
import sys
import time
from importlib import metadata

from workflow_scripts.artifacts.fingerprint import ROOT, locked
from workflow_scripts.plumbing import gpus, ranks
from workflow_scripts.plumbing.messages import InputError


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def installed(names: list[str]) -> dict[str, str]:
    """Installed versions without local tags (+cpu, +cu128)."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def check_packages(step: dict) -> dict[str, dict[str, str]]:
    """Package -> {locked, installed} where the two differ. InputError on any, unless the step allows a mismatch."""
    wanted = {name: version for name, version in step["packages"].items() if name != "python"}
    have = installed(sorted(wanted)) | {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    differ = {
        name: {"locked": version, "installed": have[name]} for name, version in step["packages"].items() if have[name] != version
    }
    if differ and not step.get("allow_package_mismatch"):
        name, versions = next(iter(differ.items()))
        raise InputError(
            f"{name}: {versions['installed']} is installed, the lock file says {versions['locked']}"
            + (f" (and {len(differ) - 1} more)" if len(differ) > 1 else "")
            + ("; this step answers by vLLM, in an environment of its own: " if "vllm" in step["packages"] else "; ")
            + ("run snakemake with `--sdm conda` (envs/vllm.yaml)" if "vllm" in step["packages"] else "run `make setup`")
            + ", or set `allow_package_mismatch: true` in the config, which every result then states"
        )
    return differ


def collect(started: float, more: dict) -> dict:
    """The content of run.json. `more`: what the step itself measured, such as tokens."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    info: dict = {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 2),
        "peak_memory_bytes": peak,
        "packages": installed(sorted(locked())),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
        info["gpu_id"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        info["gpu_peak_memory_bytes"] = gpus.peak(torch.cuda.max_memory_allocated())
        info["gpu_held_memory_bytes"] = torch.cuda.max_memory_reserved()  # with what the allocator kept beside it
    if ranks.count > 1:
        info |= {"gpus": ranks.count, "shard": ranks.in_step, "nodes": ranks.nodes}
        if "gpu" in info:  # held by who started the ranks, one whole card for each
            info |= {"gpu_seconds": round(ranks.count * info["seconds"], 2), "gpu_jobs": 1.0}
    return info | gpus.facts() | more
