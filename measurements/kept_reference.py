"""Measures what a kept reference saves: DPO and KTO at the study's shape (random weights) in full, first with the reference to be
computed, then the same with another beta, which takes it over (training/reference.py).

    python -m measurements.kept_reference --folder scratch --out kept.json                   on a GPU
    python -m measurements.kept_reference --folder scratch --out trial.json --tiny           on a CPU: that it runs

Rows and batches as in measurements/training.py, an epoch over `--pairs` pairs. `reference_s`: computing it, or finding it, the
rows held out included; `steps_s` the training's steps; `load_s` what a phase of its own would do first, loading the model.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from measurements import study_memory, training
from workflow_scripts.models import loading
from workflow_scripts.training import reference

TIMED = {"reference_s": (reference.KeptReference, "_precompute_ref_logps"), "load_s": (loading, "load")}


def watched(found: dict[str, float]) -> None:
    """Have what is timed add its seconds to `found`."""
    for name, (owner, method) in TIMED.items():
        real = getattr(owner, method)

        def timed(*args: Any, name: str = name, real: Any = real, **more: Any) -> Any:
            began = training.now()
            made = real(*args, **more)
            found[name] += training.now() - began
            return made

        setattr(owner, method, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the base and what is trained")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, to see that it runs")
    parser.add_argument("--phases", nargs="+", default=["dpo"], choices=["dpo", "kto"])
    parser.add_argument("--pairs", type=int, default=976)
    given = parser.parse_args()
    config = study_memory.configured("05b", given.tiny, 64 if given.tiny else 1024)
    study_memory.write_base(config, given.folder)
    slices = training.rows(config, given.folder, given.pairs + 16)
    seconds = dict.fromkeys(TIMED, 0.0)
    watched(seconds)
    shutil.rmtree(given.folder / "references", ignore_errors=True)
    of = reference.of
    reference.of = lambda job, start: of(job, start) | {"kept": given.folder / "references"}  # as of one config
    found: dict = {"machine": study_memory.about(), "pairs": given.pairs, "runs": []}
    for name in given.phases:
        train = config.experiments[name]["train"]
        answers = given.pairs * (2 if name == "kto" else 1)
        steps = answers // (train["per_device_train_batch_size"] * train["gradient_accumulation_steps"])
        for beta in (0.1, 0.3):
            train["beta"] = beta
            seconds |= dict.fromkeys(TIMED, 0.0)
            began = time.perf_counter()
            made = training.measure(name, "dequantised", config, given.folder, slices, steps, f"{name} {beta}")
            whole = time.perf_counter() - began
            one = {"phase": name, "beta": beta, "steps": made["steps"], "steps_s": round(sum(made["times"]), 2)}
            one |= {key: round(value, 2) for key, value in seconds.items()} | {"whole_s": round(whole, 1)}
            found["runs"].append(one)
            print("RESULT", json.dumps(one), flush=True)
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
