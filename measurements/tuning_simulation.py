"""Do verdicts and intervals keep what they promise where each method is tuned first? Families of tuned methods are simulated.

    PYTHONPATH=. python measurements/tuning_simulation.py --families 1000 --jobs 1 --csv measurements/tuning_simulation.csv
    PYTHONPATH=. python measurements/tuning_simulation.py --table measurements/tuning_simulation.csv \\
        --out docs/report_simulation.md

As in report_simulation.py, with a run for each trial. For arm a, trial t, seed s and prompt i, all effects normal:

    logit P(verdict is 1) = mu_at + difficulty_i + interaction_ai + interaction_ati + parent_s + own_as + own_ats

Half of the variance of an arm's interaction and of its seed effect is that of the trial alone. Development prompts are others of
the same population, the same for all arms and seeds. The trial that passes most of them is chosen, and only its verdicts on the
evaluation are judged, by the functions that the report calls (`workflow_scripts.stats`).

What an interval should cover is the difference between two methods *as tuned with N trials*: of the accuracy that the chosen run
has over the population of prompts, averaged over seeds and over development prompts. Between arms of one kind it is 0; else it is
averaged over the simulated families, from each chosen run's own probability, so that it is known to some hundredths of a point.
"""

import argparse
import csv
import dataclasses
import itertools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import special

from measurements.report_simulation import ALPHA, DIFFICULTY, INTERACTION, centre, expect, parts, slopes
from workflow_scripts.stats import components
from workflow_scripts.stats.moderated import moderate

PROMPTS, DEVELOPMENT, RATE, TRIALS = 541, 300, 0.3, 4
PAIRS, PARENT = "all pairs of 5", "5, reference is their parent"  # the parent is not tuned
# Points by which the trials' true accuracies lie below the best one's.
CURVES = {"flat": (0, 0, 0, 0), "two alike": (6, 0, 0, 12), "one best": (8, 4, 0, 12)}
SPREAD = {"even 1": (1.0, 1), "even 3": (3.0, 1), "one 0.2 : 4": (0.2, 20)}  # seed sd in points, times for the last arm
NONE, SOME = "none", "some"
SHIFTS = {NONE: (0, 0, 0, 0, 0), SOME: (0, 1, 2, 4, -3)}  # points that methods differ by at their best trials
PER_SEED, ONCE, UNTUNED, CHEAT = "each seed", "once over all seeds", "not at all", "each seed, on the evaluation"
CHUNK = 1_000_000  # verdicts at a time


@dataclass(frozen=True)
class Setting:
    chosen: str
    family: str
    seeds: int
    curve: str
    spread: str
    differences: str


def contrasts_of(family: str) -> np.ndarray:
    """(contrasts, arms): arms 0 to 4 are tuned, arm 5 is the parent."""
    pairs = itertools.combinations(range(5), 2) if family == PAIRS else ((5, arm) for arm in range(5))
    return np.array([np.eye(6)[after] - np.eye(6)[before] for before, after in pairs])


class World:
    """A setting as numbers on the logit scale."""

    def __init__(self, setting: Setting):
        prompts = float(np.hypot(DIFFICULTY, INTERACTION))
        slope = 100 * slopes(np.array([RATE]), prompts)[0]
        quiet, times = SPREAD[setting.spread]
        own = np.full(5, quiet)
        own[-1] *= times
        self.own, self.parent = own / slope, quiet / slope
        self.shifts = SHIFTS[setting.differences]
        self.mu = np.empty((5, TRIALS))
        for arm, shift in enumerate(self.shifts):
            for trial, below in enumerate(CURVES[setting.curve]):
                sd = float(np.sqrt(prompts**2 + self.own[arm] ** 2 + self.parent**2))
                self.mu[arm, trial] = centre(RATE + (shift - below) / 100, sd)
        self.start = centre(RATE, float(np.hypot(prompts, self.parent)))
        # The accuracy of a run over the population of prompts, by its level on the logit scale.
        nodes, weights = expect(101, prompts)
        self.levels = np.linspace(-12, 10, 2201)
        self.accuracies = special.expit(self.levels[:, None] + nodes) @ weights

    def alike(self, contrasts: np.ndarray, tuned: bool) -> np.ndarray:
        """Which contrasts are of arms without a true difference. Tuned arms have one where their runs vary differently: who
        varies more has more to choose from. The parent is not tuned."""
        if tuned:  # curve and spread of an arm
            kinds = [*((self.shifts[arm], self.own[arm]) for arm in range(5)), None]
        else:
            kinds = [*self.shifts, 0]
        return np.array([kinds[one.argmax()] == kinds[one.argmin()] for one in contrasts])

    def accuracy(self, level: np.ndarray) -> np.ndarray:
        return np.interp(level, self.levels, self.accuracies)


def verdicts(level: np.ndarray, easy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """0 and 1: levels (..., seeds) of runs, easiness (..., 1 or seeds, prompts)."""
    chance = level[..., None].astype(np.float32) + easy
    np.exp(np.negative(chance, out=chance), out=chance)
    chance += 1  # 1 / the probability
    chance *= rng.random(chance.shape, dtype=np.float32)
    return np.less(chance, 1, out=chance, casting="unsafe")


def easiness(families: int, prompts: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(families, 5 arms, trials, prompts) of the trials, (families, prompts) of the parent."""

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    half = np.float32(INTERACTION / np.sqrt(2))
    difficulty = np.float32(DIFFICULTY) * normal(families, prompts)
    own = half * (normal(families, 5, 1, prompts) + normal(families, 5, TRIALS, prompts))
    return difficulty[:, None, None] + own, difficulty + np.float32(INTERACTION) * normal(families, prompts)


def choose(setting: Setting, level: np.ndarray, passed: np.ndarray) -> np.ndarray:
    """The trial of each run (families, arms, seeds), by what passed (families, arms, trials, seeds)."""
    if setting.chosen == UNTUNED:
        return np.full((len(level), 5, setting.seeds), CURVES[setting.curve].index(0))
    if setting.chosen == ONCE:
        return np.repeat(passed.mean(axis=3).argmax(axis=2)[..., None], setting.seeds, axis=2)
    return passed.argmax(axis=2)


def draw(setting: Setting, world: World, families: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each family: verdicts (families, 6 arms, seeds, prompts) of the chosen runs and the parent; their true accuracies
    (families, 6 arms, seeds); and how often the trial with the best mean was chosen (families,)."""
    parent = world.parent * rng.standard_normal((families, 1, 1, setting.seeds))
    half = world.own[:, None, None] / np.sqrt(2)
    own = half * rng.standard_normal((families, 5, 1, setting.seeds)) + half * rng.standard_normal(
        (families, 5, TRIALS, setting.seeds)
    )
    level = world.mu[:, :, None] + parent + own
    judged, of_parent = easiness(families, PROMPTS, rng)
    if setting.chosen == CHEAT:
        whole = verdicts(level, judged[:, :, :, None], rng)
        passed = whole.mean(axis=-1)
    else:
        development = easiness(families, DEVELOPMENT, rng)[0]
        passed = verdicts(level, development[:, :, :, None], rng).mean(axis=-1)
    chosen = choose(setting, level, passed)
    levels = np.take_along_axis(level, chosen[:, :, None], axis=2)[:, :, 0]
    if setting.chosen == CHEAT:
        runs = np.take_along_axis(whole, chosen[:, :, None, :, None], axis=2)[:, :, 0]
    else:
        runs = verdicts(levels, np.take_along_axis(judged, chosen[..., None], axis=2), rng)
    start = world.start + parent[:, 0]
    both = np.concatenate([runs, verdicts(start, of_parent[:, None, None], rng)], axis=1)
    best = np.array(CURVES[setting.curve])[chosen] == 0
    return both, world.accuracy(np.concatenate([levels, start], axis=1)), best.mean(axis=(1, 2))


def simulate(task: tuple[Setting, int, np.random.SeedSequence]) -> dict:
    """One row of the table."""
    setting, families, sequence = task
    world, rng, contrasts = World(setting), np.random.default_rng(sequence), contrasts_of(setting.family)
    means, splits, truths, best = [], [], [], []
    size = max(1, CHUNK // (5 * TRIALS * setting.seeds * PROMPTS))
    for first in range(0, families, size):
        runs, true, right = draw(setting, world, min(size, families - first), rng)
        own = parts(runs, contrasts)
        means.append(own.mean)
        splits.append(moderate(own, components.effective(contrasts)))
        truths.append(true.mean(axis=2))
        best.append(right)
    mean, true = np.concatenate(means), np.concatenate(truths).mean(axis=0) @ contrasts.T
    split = components.Split(
        *(np.concatenate([getattr(one, name) for one in splits]) for name in ("prompt", "seed", "resid", "df")),
        PROMPTS,
        setting.seeds,
    )
    alike = world.alike(contrasts, tuned=setting.chosen != UNTUNED)
    true = np.where(alike, 0.0, true)
    p = components.p_value(mean, split)
    found = p <= ALPHA / len(contrasts)
    wrong = found & (alike | (np.sign(mean) != np.sign(true)))
    covers = components.p_value(mean - true, split) > ALPHA
    row = dataclasses.asdict(setting) | {"families": families, "wrong": 100 * wrong.any(axis=1).mean()}
    row |= {"coverage": 100 * covers.mean(), "worst": 100 * covers.mean(axis=0).min()}
    row |= {"found": 100 * found[:, ~alike].mean() if (~alike).any() else "", "best chosen": 100 * np.concatenate(best).mean()}
    row |= {"bias": 100 * (mean.mean(axis=0) - true)[np.abs(mean.mean(axis=0) - true).argmax()]}
    return {name: round(float(value), 3) if isinstance(value, float | np.floating) else value for name, value in row.items()}


def settings() -> list[Setting]:
    both = (PAIRS, PARENT), (3, 5)
    chosen = [Setting(*one) for one in itertools.product((PER_SEED,), *both, CURVES, SPREAD, (NONE, SOME))]
    chosen += [
        Setting(*one) for one in itertools.product((ONCE,), *both, ("flat", "one best"), ("even 3", "one 0.2 : 4"), (NONE,))
    ]
    chosen += [
        Setting(*one) for one in itertools.product((UNTUNED,), *both, ("one best",), SPREAD, (NONE, SOME))
    ]  # at their best
    return chosen + [Setting(CHEAT, PARENT, seeds, "flat", spread, NONE) for seeds in (3, 5) for spread in SPREAD]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=int, default=1000, help="simulated families for each setting")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="draw, and write the rows here")
    parser.add_argument("--table", type=Path, help="draw nothing: take the rows from here")
    parser.add_argument("--out", type=Path, help="the document whose table is written anew")
    given = parser.parse_args()
    if given.table:
        write(given.table, given.out)
        return
    chosen = settings()
    sequences = np.random.SeedSequence(given.seed).spawn(len(chosen))
    tasks = [(setting, given.families, sequence) for setting, sequence in zip(chosen, sequences, strict=True)]
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    start = time.time()
    with (
        ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool,
        given.csv.open("w", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for number, row in enumerate(pool.map(simulate, tasks), start=1):
            writer.writerow(row)
            file.flush()
            print(f"\r{number} of {len(tasks)} settings, {time.time() - start:.0f} s", end="", file=sys.stderr, flush=True)


COLUMNS = [field.name for field in dataclasses.fields(Setting)]
COLUMNS += ["families", "wrong", "coverage", "worst", "found", "best chosen", "bias"]
MARKS = ("<!-- tuned: measurements/tuning_simulation.py -->", "<!-- end of tuned -->")


def write(rows: Path, document: Path) -> None:
    """The table in the document: for each way to choose, family and number of seeds the worst of the other settings."""
    with rows.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    head = [
        "chosen",
        "family",
        "seeds",
        "settings",
        "wrong verdict %, largest",
        "coverage %",
        "worst contrast %",
        "found %",
        "best trial %",
        "bias",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key in dict.fromkeys((row["chosen"], row["family"], row["seeds"]) for row in found):
        here = [row for row in found if (row["chosen"], row["family"], row["seeds"]) == key]

        def span(name: str, here: list[dict] = here) -> str:
            values = [float(row[name]) for row in here if row[name]]
            return f"{min(values):.1f} to {max(values):.1f}" if values else ""

        wrong, worst = max(float(row["wrong"]) for row in here), min(float(row["worst"]) for row in here)
        bias = max((float(row["bias"]) for row in here), key=abs)
        cells = [
            *key,
            str(len(here)),
            f"{wrong:.1f}",
            span("coverage"),
            f"{worst:.1f}",
            span("found"),
            span("best chosen"),
            f"{bias:+.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    text = document.read_text(encoding="utf-8")
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    document.write_text(f"{text[:start]}\n\n" + "\n".join(lines) + f"\n\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
