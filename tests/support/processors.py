"""The tests whose outcome a training decides, under three instruction sets and three seeds: what `make test-processors` runs.

A sum of floats depends on the order in which a processor adds, so the same seed ends in other weights elsewhere. Here one machine
plays several: torch, oneDNN and MKL are held to older instruction sets than they would choose. A test with the marker `trained`
says by the fixture `figure` what it measures, with the threshold that it asserts; the table has a row for each.

A threshold is not one machine's number less a bit. The rule: what is to grow grows by twice the threshold or more in the worst of
the nine runs, or the worst of them is two of their standard deviations beyond it; and a broken trainer does not reach it. Where
there is no such place, the fixture is too small to show its effect, and is the thing to mend. docs/processors.md has the figures.

    python -m tests.support.processors [--sets own] [--seeds 1] [--jobs 1] [--show] [tests/report ...]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
SETS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "own": {},  # whatever the libraries choose on this machine
}
SEEDS = (1, 2, 3)

SEED = int(os.environ.get("PHASELINE_SEED", "1"))  # of what the tests train, where they name no other
WORLD = os.environ.get("PHASELINE_WORLD")  # the folder in which this run keeps its tiny world: only what is stale is made again


@dataclass
class Figure:
    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    def margin(self) -> float:
        """How far the value is on the right side of the nearer threshold; below 0 it is on the wrong one."""
        below = float("inf") if self.at_least is None else self.value - self.at_least
        above = float("inf") if self.at_most is None else self.at_most - self.value
        return min(below, above)

    def thresholds(self) -> str:
        parts = ((">=", self.at_least), ("<=", self.at_most))
        return ", ".join(f"{sign} {shown(limit)}" for sign, limit in parts if limit is not None)

    def check(self) -> None:
        assert self.at_least is not None or self.at_most is not None, f"{self.name}: no threshold"
        assert self.margin() >= 0, f"{self.name}: found {shown(self.value)}, expected {self.thresholds()}"


def shown(value: float) -> str:
    return f"{value:.3g}"


# -- running ----------------------------------------------------------------------------------------------------------


def environment(name: str) -> dict[str, str]:
    own = {key for switches in SETS.values() for key in switches}
    return {key: value for key, value in os.environ.items() if key not in own} | SETS[name] | {"OMP_NUM_THREADS": "1"}


def run(folder: Path, name: str, seed: int, paths: list[str]) -> None:
    """The marked tests under one instruction set with one seed. What other tests said before is kept where only some are run."""
    place = folder / f"{name}.{seed}"
    place.mkdir(parents=True, exist_ok=True)
    report, log = place / "junit.xml", place / "log.txt"
    report.unlink(missing_ok=True)
    env = environment(name) | {"PHASELINE_SEED": str(seed), "PHASELINE_WORLD": str(place / "world")}
    # Not the default config from nothing: most of that is pretraining, and `make test-all` has it.
    chosen = ["-m", "trained", "-k", "not scratch", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", "-q", *chosen]
    started = time.monotonic()
    with log.open("w") as file:
        code = subprocess.run([*command, *paths], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT).returncode
    print(f"{name}, seed {seed}: {time.monotonic() - started:.0f} s, pytest ended with {code}; {log}", flush=True)
    if code in (0, 1):  # else it did not get as far as to run tests
        kept = (read(place) or {}) if paths else {}
        (place / "tests.json").write_text(json.dumps(kept | outcomes(report), indent=1))
    elif not paths:
        (place / "tests.json").unlink(missing_ok=True)


def outcomes(report: Path) -> dict[str, dict]:
    """Test -> whether it passed, what it said if not, and its figures, from pytest's XML."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [one for kind in ("failure", "error") for one in case.findall(kind)]
        if case.find("skipped") is not None:
            continue
        said = bad[0].get("message", "").splitlines() if bad else []
        figures = [json.loads(one.get("value", "")) for one in case.iter("property") if one.get("name") == "figure"]
        found[f"{case.get('classname')}::{case.get('name')}"] = {"passed": not bad, "said": said[:1], "figures": figures}
    return found


def read(place: Path) -> dict[str, dict] | None:
    file = place / "tests.json"
    return json.loads(file.read_text()) if file.exists() else None


# -- the table --------------------------------------------------------------------------------------------------------


def table(runs: dict[str, dict[str, dict] | None]) -> tuple[list[str], bool]:
    """(lines: a row for each figure with its value in each run, then what is red; whether all is green)."""
    rows: dict[tuple[str, str], dict[str, Figure]] = {}
    for run_, tests in runs.items():
        for test, outcome in (tests or {}).items():
            for one in outcome["figures"]:
                rows.setdefault((test.removeprefix("tests."), one["name"]), {})[run_] = Figure(**one)

    def line(*cells: str) -> str:
        *values, threshold, margin, spread = cells
        return " ".join([*(f"{cell:>9}" for cell in values), f"{threshold:>18}", f"{margin:>9}", f"{spread:>8}"])

    lines, last = [" " * 45 + line(*runs, "threshold", "margin", "sd")], ""
    for (test, name), figures in rows.items():
        if test != last:
            lines.append(test)
            last = test
        values = [figure.value for figure in figures.values()]
        worst = min(figures.values(), key=Figure.margin)
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        cells = [shown(figures[run_].value) if run_ in figures else "-" for run_ in runs]
        cells += [worst.thresholds(), shown(worst.margin()), shown(spread)]
        verdict = "" if worst.margin() >= 0 else "  RED"
        lines.append(f"  {name:43}{line(*cells)}{verdict}")
    lines += ["", "threshold: what the test asserts; margin: of the worst run, in the figure's own unit; sd: between the runs"]
    red = [f"{run_}: no outcome" for run_, tests in runs.items() if not tests]
    known = {test for tests in runs.values() for test in tests or {}}
    for run_, tests in runs.items():
        if tests and (missing := sorted(known - set(tests))):
            red.append(f"{run_}: {len(missing)} of {len(known)} tests have not run, {missing[0]} among them")
        red += [f"{run_}: {test}: {' '.join(one['said'])}" for test, one in (tests or {}).items() if not one["passed"]]
    passed = [f"{run_} {sum(one['passed'] for one in tests.values())} of {len(tests)}" for run_, tests in runs.items() if tests]
    lines += ["tests that passed: " + ", ".join(passed)]
    return [*lines, *(f"RED {line}" for line in red)], not red


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="*", help="only these tests; what is known of the others stays in the table")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side; each keeps one core busy")
    parser.add_argument("--folder", type=Path, default=ROOT / "tests/.processors")
    parser.add_argument("--show", action="store_true", help="only the table of what has run")
    given = parser.parse_args(argv)
    pairs = [(name, seed) for seed in given.seeds for name in given.sets]
    if not given.show:
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(lambda pair: run(given.folder, *pair, given.paths), pairs))
    lines, green = table({f"{name}.{seed}": read(given.folder / f"{name}.{seed}") for name, seed in sorted(pairs)})
    print("\n".join(lines))
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
