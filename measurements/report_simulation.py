"""Do the report's verdicts and intervals keep what they promise? Families of binary verdicts are simulated and judged.

    PYTHONPATH=. python measurements/report_simulation.py --families 1000 --jobs 2 --csv measurements/report_simulation.csv
    PYTHONPATH=. python measurements/report_simulation.py --table measurements/report_simulation.csv \\
        --out docs/report_simulation.md

The first draws (fifteen minutes on one core), the second writes the tables into the document. The model, for arm a,
seed s and prompt i, with all effects normal:

    logit P(verdict is 1) = mu_a + difficulty_i + interaction_ai + parent_s + own_as

What a 95 % interval must cover is the difference between two arms over the population of prompts and seeds. mu_a is therefore
solved so that each arm's probability, averaged over all effects, is the base rate: in a null family all true differences are
exactly 0. A difference for the power, or as large as the margin, is added to the estimates of the same null family. The figures
come from the functions that the report itself calls (`workflow_scripts.stats`); beside them, on the same draws, those of the
pooled seed variance with Satterthwaite's degrees of freedom, which the report had before.
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
from scipy import optimize, special, stats

from workflow_scripts.stats import components
from workflow_scripts.stats.components import Parts
from workflow_scripts.stats.moderated import moderate

ALPHA, MARGIN, LIMIT = 0.05, 0.02, 0.01  # of a family; of equivalence, a fraction; of the null control
DIFFICULTY, INTERACTION = 3.0, 0.7  # standard deviations on the logit scale
PROMPTS = {400: 0.3, 541: 0.3, 1319: 0.3, 14042: 0.5}  # how many -> accuracy of every arm
SEEDS = (2, 3, 5, 10)
SHARED, OWN, BASE, PAIRS = "5, reference is their parent", "5, independent reference", "6 against the base", "all pairs of 5"
NULL = "null control"
SPREAD = {  # seed effects -> (sd of quiet arms in points, times for a wild one, which are wild)
    "none": (0.0, 1, "no"),
    "even 1": (1.0, 1, "no"),
    "even 3": (3.0, 1, "no"),
    "one 1 : 3": (1.0, 3, "one"),
    "one 0.1 : 1": (0.1, 10, "one"),
    "one 0.1 : 2": (0.1, 20, "one"),
    "one 0.2 : 4": (0.2, 20, "one"),
    "half 0.1 : 2": (0.1, 20, "half"),
    "start 0.1 : 2": (0.1, 20, "start"),
}
FULL, FEW = (541, 14042), ("even 1", "one 1 : 3", "one 0.2 : 4", "half 0.1 : 2")  # for the other sizes, few spreads
MORE_TRUST = (14042,)  # prompts for which it is also tried to let the family add twice as many degrees of freedom
CHUNK = 6_000_000  # verdicts at a time


@dataclass(frozen=True)
class Setting:
    family: str
    prompts: int
    seeds: int
    spread: str
    verdicts: str  # binary | limit: see `limit`


@dataclass(frozen=True)
class Model:
    """The setting as numbers: one entry for each arm; arm 0 is the reference."""

    contrasts: np.ndarray  # (contrasts, arms)
    mu: np.ndarray
    parent: np.ndarray  # sd on the logit scale of the effect that all arms of a seed share
    own: np.ndarray  # sd of each arm's own seed effect
    fixed: bool  # arm 0 is a model without seeds: the same answers with each


def expect(values: int, sd: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a normal expectation (Gauss-Hermite)."""
    if sd == 0:
        return np.zeros(1), np.ones(1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(values)
    return sd * nodes, weights / weights.sum()


def centre(rate: float, sd: float) -> float:
    """mu such that the mean of expit(mu + normal(0, sd)) is the rate."""
    nodes, weights = expect(101, sd)
    return float(optimize.brentq(lambda mu: weights @ special.expit(mu + nodes) - rate, -30, 30, xtol=1e-12))


def slopes(rates: np.ndarray, sd: float) -> np.ndarray:
    """Accuracy gained for each logit, at each rate: points into logits."""
    nodes, weights = expect(101, sd)
    chances = special.expit(np.array([[centre(rate, sd)] for rate in rates]) + nodes)
    return (chances * (1 - chances)) @ weights


def model(setting: Setting) -> Model:
    if setting.family == NULL:  # the SFT model against itself under other seeds, sd 3, and five quiet children
        sds = np.array([3.0, 3.0] + 5 * [0.3])
        contrasts = np.hstack([np.zeros((5, 1)), -np.ones((5, 1)), np.eye(5)])
        return _model(setting, np.vstack([contrasts, np.eye(7)[0] - np.eye(7)[1]]), sds, np.array([0.0, 0.0] + 5 * [3.0]), False)
    count = {SHARED: 6, OWN: 6, BASE: 7, PAIRS: 5}[setting.family]
    pairs = [(b, a) for a, b in itertools.combinations(range(count), 2) if a == 0 or setting.family == PAIRS]
    contrasts = np.array([np.eye(count)[after] - np.eye(count)[before] for after, before in pairs])
    quiet, times, wild = SPREAD[setting.spread]
    own = np.full(count, quiet)
    chosen = {"no": slice(0, 0), "one": slice(count - 1, count), "half": slice(count // 2, count), "start": slice(0, 1)}[wild]
    own[chosen] *= times
    parent = np.zeros(count)
    if setting.family == SHARED:  # the reference's own effect is the one that its children inherit
        parent[:], own[0] = own[0], 0.0
    elif setting.family == BASE:  # the children share what their SFT run was; the base has none
        parent[1:], own[0] = own[0], 0.0
    return _model(setting, contrasts, own, parent, setting.family == BASE)


def _model(setting: Setting, contrasts: np.ndarray, own: np.ndarray, parent: np.ndarray, fixed: bool) -> Model:
    rate, prompts = PROMPTS[setting.prompts], float(np.hypot(DIFFICULTY, INTERACTION))
    slope = 100 * slopes(np.array([rate]), prompts)[0]
    own, parent = own / slope, parent / slope
    mu = [centre(rate, float(np.sqrt(prompts**2 + a**2 + b**2))) for a, b in zip(own, parent, strict=True)]
    return Model(contrasts, np.array(mu), parent, own, fixed)


def draw(setting: Setting, world: Model, families: int, rng: np.random.Generator) -> np.ndarray:
    """(families, arms, seeds, prompts) of 0 and 1."""
    arms, seeds, prompts = len(world.own), setting.seeds, setting.prompts

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    easy = np.float32(DIFFICULTY) * normal(families, 1, prompts) + np.float32(INTERACTION) * normal(families, arms, prompts)
    parent, own = normal(families, 1, seeds), normal(families, arms, seeds)
    if setting.family == NULL:  # the second arm is the parent of the others: its own effect is theirs
        parent[:, 0], shared = own[:, 1], np.array([0, 0] + 5 * [1], dtype=np.float32)
        effect = world.own.astype(np.float32)[:, None] * own + (world.parent.astype(np.float32) * shared)[:, None] * parent
    else:
        effect = world.own.astype(np.float32)[:, None] * own + world.parent.astype(np.float32)[:, None] * parent
    found = np.empty((families, arms, seeds, prompts), dtype=np.float32)
    for seed in range(seeds):  # seed by seed: half the memory
        chance = easy + (world.mu.astype(np.float32)[:, None] + effect[:, :, seed, None])
        np.negative(chance, out=chance)
        np.exp(chance, out=chance)
        chance += 1  # 1 / the probability
        chance *= rng.random(chance.shape, dtype=np.float32)
        np.less(chance, 1, out=found[:, :, seed], casting="unsafe")
    if world.fixed:
        found[:, 0] = found[:, 0, :1]
    return found


def parts(runs: np.ndarray, contrasts: np.ndarray) -> Parts:
    """`components.parts` of each contrast's differences, from sums of products over arms: (families, contrasts)."""
    seeds, prompts = runs.shape[-2:]
    by_prompt, by_seed = runs.sum(axis=-2), runs.sum(axis=-1, dtype=np.float64)
    flat = runs.reshape(*runs.shape[:-2], -1)
    mean = by_seed.sum(axis=-1) @ contrasts.T / (seeds * prompts)
    between = np.square(np.einsum("ka,fas->fks", contrasts, by_seed) / prompts - mean[..., None]).sum(axis=-1)

    def squares(table: np.ndarray) -> np.ndarray:
        """Sums of squares of the contrasts' rows; sums of whole numbers, exact in float32 below 2^24."""
        return np.einsum("ka,fab,kb->fk", contrasts, (table @ table.swapaxes(-1, -2)).astype(np.float64), contrasts)

    over_prompts = squares(by_prompt) / seeds**2 - prompts * mean**2
    rest = squares(flat) - seeds * prompts * mean**2 - seeds * over_prompts - prompts * between
    size, each = seeds * prompts, (seeds - 1) * (prompts - 1)
    return Parts(
        mean,
        over_prompts / (prompts - 1) / prompts,
        between / (seeds - 1) / seeds,
        np.maximum(0, rest) / each / size,
        seeds,
        prompts,
    )


def limit(setting: Setting, world: Model, families: int, rng: np.random.Generator) -> Parts:
    """The parts of each contrast where prompts are many: means over prompts are normal, mean squares chi-square.

    Of a difference of two arms, the variances between prompts and of what neither explains come from binary verdicts, drawn as
    `draw` does; each arm has half of them. The verdicts of a model without seeds do not differ between seeds.
    """
    prompts, seeds, arms = setting.prompts, setting.seeds, len(world.own)
    two = np.eye(arms)[[2]] - np.eye(arms)[[1]]
    pilot = parts(draw(dataclasses.replace(setting, seeds=4), world, 8, rng), two)
    between = np.full(arms, float((pilot.prompt - pilot.resid).mean()) / 2)  # of an arm's mean, by the choice of prompts
    rest = np.full(arms, float(pilot.resid.mean()) * 4 / 2)  # of one run's mean
    if world.fixed:
        between[0], rest[0] = between[0] + rest[0], 0.0
    slope = slopes(np.array([PROMPTS[prompts]]), float(np.hypot(DIFFICULTY, INTERACTION)))[0]
    effects = world.own[:, None] * rng.standard_normal((families, arms, seeds))
    effects += world.parent[:, None] * rng.standard_normal((families, 1, seeds))
    runs = slope * effects + np.sqrt(rest)[:, None] * rng.standard_normal((families, arms, seeds))
    runs += (np.sqrt(between) * rng.standard_normal((families, arms)))[:, :, None]
    by_seed = np.einsum("ka,fas->fks", world.contrasts, runs)
    shape, df = by_seed.shape[:2], (prompts - 1, (prompts - 1) * (seeds - 1))
    resid = np.square(world.contrasts) @ rest / seeds
    prompt = (np.square(world.contrasts) @ between + resid) * rng.chisquare(df[0], shape) / df[0]
    seed = by_seed.var(axis=-1, ddof=1) / seeds
    return Parts(by_seed.mean(axis=-1), prompt, seed, resid * rng.chisquare(df[1], shape) / df[1], seeds, prompts)


def pooled(own: Parts, worth: float) -> tuple[np.ndarray, np.ndarray]:
    """What the report had before, the seed part pooled: (standard error, Satterthwaite's degrees of freedom)."""
    seed, resid = (part.mean(axis=-1, keepdims=True) for part in (own.seed, own.resid))
    variance = own.prompt + np.maximum(0.0, seed - resid)
    dfs = own.prompts - 1, worth * (own.seeds - 1), worth * (own.seeds - 1) * (own.prompts - 1)
    noise = sum(np.square(part) / df for part, df in zip((own.prompt, seed, resid), dfs, strict=True))
    return np.sqrt(variance), np.clip(variance**2 / noise, min(dfs), dfs[0])


def found_at(distance: np.ndarray, most: np.ndarray) -> float:
    """The true difference that is found with 80 %, in points: distance is the estimate at 0, found where |estimate| > most."""

    def short(effect: float) -> float:
        return float(np.mean(np.abs(distance + effect) > most)) - 0.8

    return 100 * float(optimize.brentq(short, 0, 100 * most.max() + 100, xtol=1e-6))


def judge(own: Parts, contrasts: np.ndarray) -> dict:
    """For each family: was there a wrong verdict? For each contrast: does its interval cover?"""
    worth, each = components.effective(contrasts), ALPHA / len(contrasts)
    split = moderate(own, worth)
    p, (se, df) = components.p_value(own.mean, split), pooled(own, worth)
    before = 2 * special.stdtr(df, -np.abs(own.mean) / se)
    last = dataclasses.replace(split, **{name: getattr(split, name)[:, 0] for name in ("prompt", "seed", "resid", "df")})
    same = [components.p_equivalent(own.mean + shift, split, MARGIN) <= each for shift in (0, MARGIN)]
    found = {
        "wrong": p.min(axis=1) <= each,
        "covers": p > ALPHA,
        "wrong before": before.min(axis=1) <= each,
        "covers before": before > ALPHA,
        "estimate": own.mean[:, 0],
        "most": components.half_width(last, each),
        "most before": stats.t.isf(each / 2, df[:, 0]) * se[:, 0],
        "equivalent": same[0].mean(axis=1),
        "wrongly equivalent": same[1].any(axis=1),
    }
    if own.seeds == 3 and own.prompts in MORE_TRUST:
        p = components.p_value(own.mean, moderate(own, worth, trust=2.0))
        found |= {"wrong, twice": p.min(axis=1) <= each, "covers, twice": p > ALPHA}
    return found


def judge_null(runs: np.ndarray, contrasts: np.ndarray) -> dict:
    """The null control, as `family.again` judges it, and as it was before: with the variance of five quiet children pooled in."""
    first, second = (parts(runs[:, [arm]], np.eye(1)) for arm in (0, 1))
    own = parts(runs, contrasts)
    alone = parts(runs[:, :2], np.array([[1.0, -1.0]]))
    alone = dataclasses.replace(alone, seed=first.seed + second.seed, resid=first.resid + second.resid)
    se, df = pooled(own, components.effective(contrasts))
    return {
        "wrong": components.p_value(alone.mean, components.alone(alone, groups=2))[:, 0] < LIMIT,
        "wrong before": (2 * stats.t.sf(np.abs(own.mean) / se, df))[:, -1] < LIMIT,
    }


def simulate(task: tuple[Setting, int, np.random.SeedSequence]) -> dict:
    """One row of the table."""
    setting, families, sequence = task
    world, rng = model(setting), np.random.default_rng(sequence)
    families *= 4 if setting.family == NULL else 1
    at_once = max(1, CHUNK // (len(world.own) * setting.seeds * setting.prompts))
    if setting.verdicts == "limit":
        at_once = families
    found: dict[str, list] = {}
    for start in range(0, families, at_once):
        size = min(at_once, families - start)
        if setting.family == NULL:
            judged = judge_null(draw(setting, world, size, rng), world.contrasts)
        elif setting.verdicts == "limit":
            judged = judge(limit(setting, world, size, rng), world.contrasts)
        else:
            runs = draw(setting, world, size, rng)
            own = parts(runs, world.contrasts)
            if start == 0:
                check(own, runs[0], world.contrasts)
            judged = judge(own, world.contrasts)
        for name, values in judged.items():
            found.setdefault(name, []).append(values)
    all_ = {name: np.concatenate(values) for name, values in found.items()}
    row = dataclasses.asdict(setting) | {"families": families}
    row |= {name: 100 * float(np.mean(all_[name])) for name in ("wrong", "wrong before")}
    if setting.family != NULL:
        row |= {"coverage": 100 * all_["covers"].mean(), "worst": 100 * all_["covers"].mean(axis=0).min()}
        row |= {
            "coverage before": 100 * all_["covers before"].mean(),
            "worst before": 100 * all_["covers before"].mean(axis=0).min(),
        }
        row |= {f"found{kind}": found_at(all_["estimate"], all_[f"most{kind}"]) for kind in ("", " before")}
        if "covers, twice" in all_:
            row |= {"wrong, twice": 100 * float(np.mean(all_["wrong, twice"]))}
            row |= {"worst, twice": 100 * all_["covers, twice"].mean(axis=0).min()}
        row |= {name: 100 * float(np.mean(all_[name])) for name in ("equivalent", "wrongly equivalent")}
    return {name: round(float(value), 3) if isinstance(value, float) else value for name, value in row.items()}


def check(own: Parts, runs: np.ndarray, contrasts: np.ndarray) -> None:
    """The short cut by sums of products is the report's own `components.parts`."""
    table = np.einsum("ka,asi->ksi", contrasts, runs.astype(float))
    expected = components.parts(table)
    for name in ("mean", "prompt", "seed", "resid"):
        np.testing.assert_allclose(getattr(own, name)[0], getattr(expected, name), rtol=1e-6, atol=1e-12)


def settings() -> list[Setting]:
    """Every family in the limit of many prompts, and some of them with binary verdicts: they say whether the limit is near."""
    families = (SHARED, OWN, BASE, PAIRS)
    every = itertools.product(families, PROMPTS, SEEDS, SPREAD)
    chosen = [Setting(*one, "limit") for one in every if one[1] in FULL or one[3] in FEW]
    chosen += [Setting(*one, "binary") for one in itertools.product(families, (541,), (3,), FEW)]
    chosen += [Setting(*one, "binary") for one in itertools.product((SHARED, PAIRS), (541,), (2, 5, 10), FEW[1:])]
    chosen += [Setting(*one, "binary") for one in itertools.product((SHARED, PAIRS), (400, 1319), (3,), FEW[2:])]
    chosen = [one for one in chosen if not (one.family == PAIRS and SPREAD[one.spread][2] == "start")]
    return chosen + [Setting(NULL, 541, seeds, "SFT 3, children 0.3", "binary") for seeds in SEEDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=int, default=1000, help="simulated families for each setting")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="draw, and write the rows here")
    parser.add_argument("--table", type=Path, help="draw nothing: take the rows from here")
    parser.add_argument("--out", type=Path, help="the document whose tables are written anew")
    given = parser.parse_args()
    if given.table:
        from measurements import simulation_tables

        simulation_tables.write(given.table, given.out)
        return
    chosen = settings()
    sequences = np.random.SeedSequence(given.seed).spawn(len(chosen))
    tasks = [(setting, given.families, sequence) for setting, sequence in zip(chosen, sequences, strict=True)]
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # in the jobs: small matrices, and threads that spin
    start, names = time.time(), None
    with (
        ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool,
        given.csv.open("w", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        for number, row in enumerate(pool.map(simulate, tasks), start=1):
            if names is None:
                names = list(COLUMNS)
                writer.writerow(names)
            writer.writerow([row.get(name, "") for name in names])
            file.flush()
            print(f"\r{number} of {len(tasks)} settings, {time.time() - start:.0f} s", end="", file=sys.stderr, flush=True)


COLUMNS = (
    "family", "prompts", "seeds", "spread", "verdicts", "families", "wrong", "wrong before", "coverage", "coverage before",
    "worst", "worst before", "found", "found before", "equivalent", "wrongly equivalent", "wrong, twice", "worst, twice",
)  # fmt: skip

if __name__ == "__main__":
    main()
