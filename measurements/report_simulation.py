"""Do the report's verdicts and intervals keep what they promise? Families of binary verdicts are simulated and compared.

    PYTHONPATH=. python measurements/report_simulation.py --families 1000 --jobs 2

Prints the tables of docs/report_simulation.md; about five minutes on two cores.

The model, for arm a, seed s and prompt i, with all effects normal:

    logit P(verdict is 1) = mu_a + difficulty_i + interaction_ai + parent_s + own_as

What a 95 % interval must cover is the difference between two arms over the population of prompts and seeds. mu_a is therefore
solved so that each arm's probability, averaged over all effects, is the base rate: in a null family all true differences are
exactly 0. The figures come from the functions that the report itself calls (`workflow_scripts.stats.components`).
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
from scipy import optimize, special

from workflow_scripts.stats import components, power
from workflow_scripts.stats.family import homogeneity

ALPHA, PROMPTS, CHUNK = 0.05, 541, 50
DIFFICULTY, INTERACTION = 3.0, 0.7  # standard deviations on the logit scale, where no score files are given
REFERENCE, PAIRS = "6 against a reference", "all pairs of 5"


@dataclass(frozen=True)
class Setting:
    family: str
    seeds: int
    parent: str  # shared | independent
    variances: str  # equal | unequal: the first arm 0.5 times, the second 2 times the seed sd
    rate: float
    seed_sd: float  # points: of a run's accuracy, from its own seed effect
    difficulty: float
    interaction: float


@dataclass(frozen=True)
class Model:
    """The setting as numbers: one entry for each arm; arm 0 is the reference, the last one is shifted for the power."""

    contrasts: np.ndarray  # (contrasts, arms)
    mu: np.ndarray
    parent: np.ndarray  # sd of the effect that all arms of a seed share, as each arm feels it
    own: np.ndarray  # sd of each arm's own seed effect


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


def model(setting: Setting, shift: float = 0.0) -> Model:
    """The setting with the last arm's true accuracy shifted. Its seed effects keep their size in points, not in logits."""
    count = 7 if setting.family == REFERENCE else 5
    pairs = [(a, 0) for a in range(1, 7)] if count == 7 else [(b, a) for a, b in itertools.combinations(range(5), 2)]
    contrasts = np.zeros((len(pairs), count))
    for row, (after, before) in zip(contrasts, pairs, strict=True):
        row[after], row[before] = 1, -1
    prompts = np.hypot(setting.difficulty, setting.interaction)
    own, parent = np.full(count, setting.seed_sd), np.zeros(count)  # in points
    if setting.variances == "unequal":
        own[:2] *= 0.5, 2
    if setting.parent == "shared":
        parent[:] = setting.seed_sd
        if setting.family == REFERENCE:  # the reference is the parent: its own effect is the one that its children inherit
            parent[:], own[0] = own[0], 0.0
    rates = np.full(count, setting.rate)
    rates[-1] += shift
    own, parent = (sds / slopes(rates, prompts) / 100 for sds in (own, parent))
    mu = [centre(rate, np.sqrt(prompts**2 + a**2 + b**2)) for rate, a, b in zip(rates, own, parent, strict=True)]
    return Model(contrasts, np.array(mu), parent, own)


def slopes(rates: np.ndarray, sd: float) -> np.ndarray:
    """Accuracy gained for each logit, at each rate: points into logits."""
    nodes, weights = expect(101, sd)
    chances = special.expit(np.array([[centre(rate, sd)] for rate in rates]) + nodes)
    return (chances * (1 - chances)) @ weights


def truth(setting: Setting, world: Model, after: int, before: int) -> tuple[float, float, float]:
    """The variances (prompt, seed, residual) of d[s, i] between two arms, by quadrature over all effects."""
    difficulty, difficulty_w = expect(41, setting.difficulty)
    parent, parent_w = expect(15, float(world.parent.any()))
    means, by_prompt, by_seed = [], [], []
    for arm in (after, before):
        interaction, interaction_w = expect(15, setting.interaction)
        own, own_w = expect(15, world.own[arm])
        logit = world.mu[arm] + difficulty[:, None, None, None] + interaction[:, None, None] + own
        logit = logit + world.parent[arm] * parent[:, None]
        chances = special.expit(logit)  # (difficulty, interaction, parent, own)
        means.append(np.einsum("buPo,u,o->bP", chances, interaction_w, own_w))
        by_prompt.append((np.einsum("buPo,P,o->bu", chances, parent_w, own_w), interaction_w))
        by_seed.append((np.einsum("buPo,b,u->Po", chances, difficulty_w, interaction_w), own_w))
    first, second = (difficulty_w @ mean @ parent_w for mean in means)
    square = (first - second) ** 2

    def spread(sides: list[tuple[np.ndarray, np.ndarray]], shared_w: np.ndarray) -> float:
        """Variance of the difference of two functions of a shared effect and of one effect of each side's own."""
        inner = [values @ weights for values, weights in sides]
        within = sum(np.square(values) @ weights - mean**2 for (values, weights), mean in zip(sides, inner, strict=True))
        return float(shared_w @ (within + (inner[0] - inner[1]) ** 2) - square)

    prompt, seed = spread(by_prompt, difficulty_w), spread(by_seed, parent_w)
    both_right = difficulty_w @ (means[0] * means[1]) @ parent_w
    return prompt, seed, float(first + second - 2 * both_right - square - prompt - seed)


def detectable(setting: Setting) -> tuple[float, Model]:
    """(minimum detectable effect of the last arm against arm 0 from the true variances, the model with that arm shifted by it).

    The shift changes the variances between prompts, so both are solved for together.
    """
    n, seeds, effect, world = PROMPTS, setting.seeds, 0.0, model(setting)
    worth = components.effective(world.contrasts)
    for _ in range(8):
        prompt, seed, resid = truth(setting, world, len(world.mu) - 1, 0)
        residual = resid / (n * seeds)
        squares = (prompt / n + residual, seed / seeds + residual, residual)
        variance = squares[0] + seed / seeds
        df = components.satterthwaite(np.array(variance), tuple(map(np.array, squares)), components.dfs(seeds, n, worth))
        effect = power.detectable(variance**0.5, float(df), ALPHA / len(world.contrasts))
        world = model(setting, effect)
    return effect, world


def verdicts(setting: Setting, worlds: list[Model], families: int, rng: np.random.Generator) -> list[np.ndarray]:
    """For each model (families, arms, seeds, prompts) of 0 and 1, all from the same random numbers."""
    arms, seeds = len(worlds[0].mu), setting.seeds

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    chance = rng.random((families, arms, seeds, PROMPTS), dtype=np.float32)
    np.clip(chance, 1e-7, 1 - 1e-7, out=chance)
    noise = np.log(chance / (1 - chance))  # logistic: above -logit with the probability of the logit
    noise += np.float32(setting.difficulty) * normal(families, 1, 1, PROMPTS)
    noise += np.float32(setting.interaction) * normal(families, arms, 1, PROMPTS)
    parent, own = normal(families, 1, seeds, 1), normal(families, arms, seeds, 1)
    found = []
    for world in worlds:
        mu, by_parent, by_own = (each.astype(np.float32)[:, None, None] for each in (world.mu, world.parent, world.own))
        found.append((noise > -(mu + by_parent * parent + by_own * own)).astype(float))
    return found


def judge(runs: np.ndarray, contrasts: np.ndarray, worth: float) -> tuple[np.ndarray, ...]:
    """For each family and contrast: p, whether the interval covers 0, whether the unpooled one does."""
    after, before = contrasts.argmax(axis=1), contrasts.argmin(axis=1)
    own = components.parts(runs[:, after] - runs[:, before])
    pooled = (part.mean(axis=1, keepdims=True) for part in (own.seed, own.resid))
    found = [components.variance(own, *pooled, worth), components.variance(own, own.seed, own.resid, 1.0)]
    p, p_unpooled = (components.p_value(own.mean, variance, df, PROMPTS) for variance, df in found)
    return p, p > ALPHA, p_unpooled > ALPHA


def simulate(task: tuple[Setting, int, np.random.SeedSequence]) -> dict:
    """One row of the table."""
    setting, families, sequence = task
    world, rng = model(setting), np.random.default_rng(sequence)
    worth, count = components.effective(world.contrasts), len(world.contrasts)
    effect, shifted = detectable(setting)
    tested = int(np.flatnonzero((world.contrasts[:, -1] == 1) & (world.contrasts[:, 0] == -1))[0])
    wrong, uneven, found, covered, covered_unpooled = [], [], [], [], []
    for start in range(0, families, CHUNK):
        size = min(CHUNK, families - start)
        null, alternative = verdicts(setting, [world, shifted], size, rng)
        p, covers, covers_unpooled = judge(null, world.contrasts, worth)
        wrong += list(p.min(axis=1) <= ALPHA / count)  # Holm's first step: with it, or not at all, comes a wrong verdict
        covered.append(covers)
        covered_unpooled.append(covers_unpooled)
        for family in null:
            checked = homogeneity({str(arm): runs for arm, runs in enumerate(family)})
            uneven.append(checked is not None and checked.p <= ALPHA)
        found += list(judge(alternative, world.contrasts, worth)[0][:, tested] <= ALPHA / count)
    coverage = np.concatenate(covered).mean(axis=0)
    return {
        **dataclasses.asdict(setting),
        "families": families,
        "fwer": 100 * np.mean(wrong),
        "coverage": 100 * coverage.mean(),
        "worst": 100 * coverage.min(),
        "unpooled": 100 * np.concatenate(covered_unpooled).mean(),
        "power": 100 * np.mean(found),
        "mde": 100 * effect,
        "uneven": 100 * np.mean(uneven),
    }


def settings(difficulty: float, interaction: float) -> list[Setting]:
    chosen = []
    for family, seeds, rate, sd in itertools.product((REFERENCE, PAIRS), (3, 5), (0.12, 0.3, 0.6), (0.0, 1.0, 2.0, 3.0)):
        kinds = itertools.product(("shared", "independent"), ("equal", "unequal")) if sd else [("independent", "equal")]
        chosen += [Setting(family, seeds, parent, even, rate, sd, difficulty, interaction) for parent, even in kinds]
    return chosen


def fitted(paths: list[Path]) -> tuple[float, float]:
    """(difficulty, interaction): standard deviations on the logit scale that give the covariances of real verdicts.

    By moments: two runs of different arms share the difficulty, two seeds of one arm (`ifeval_dpo.json`, `ifeval_dpo.seed2.json`)
    the interaction, too. Without a second seed of an arm the interaction stays at its default.
    """
    runs = {}
    for path in paths:
        rows = json.loads(path.read_text())["per_prompt"]
        runs[path.name.removesuffix(".json")] = {row["key"]: all(row["follow_instruction_list_strict"]) for row in rows}
    table = pandas.DataFrame(runs).dropna().astype(float)
    if len(table.columns) < 2:
        sys.exit(f"--scores: found {len(table.columns)} file, expected at least two, to see which prompts are hard for both")
    shares: dict[bool, list[float]] = {True: [], False: []}
    for a, b in itertools.combinations(table.columns, 2):
        one, other = table[a].mean(), table[b].mean()
        if 0 < one < 1 and 0 < other < 1:
            correlation = np.cov(table[a], table[b])[0, 1] / np.sqrt(one * (1 - one) * other * (1 - other))
            shares[a.split(".")[0] == b.split(".")[0]].append(correlation)
    if not shares[False]:
        sys.exit("--scores: found one arm, or arms without any spread of verdicts; expected files of at least two arms")
    rate = table.to_numpy().mean()

    def correlation(shared: float, own: float) -> float:
        """Of two verdicts that share a normal effect and have another of their own."""
        nodes, weights = expect(41, shared)
        mu, (inner, inner_w) = centre(rate, np.hypot(shared, own)), expect(15, own)
        chances = special.expit(mu + nodes[:, None] + inner) @ inner_w
        return float((weights @ chances**2 - rate**2) / (rate * (1 - rate)))

    def solve(function, target: float) -> float:
        return 0.0 if target <= function(0.0) else float(optimize.brentq(lambda sd: function(sd) - target, 0, 20))

    between = float(np.mean(shares[False]))
    if not shares[True]:
        return solve(lambda sd: correlation(sd, INTERACTION), between), INTERACTION
    total = solve(lambda sd: correlation(sd, 0.0), float(np.mean(shares[True])))
    part = optimize.minimize_scalar(
        lambda angle: (correlation(total * np.cos(angle), total * np.sin(angle)) - between) ** 2,
        bounds=(0, np.pi / 2),
        method="bounded",
    ).x
    return float(total * np.cos(part)), float(total * np.sin(part))


COLUMNS = {
    "family": "family",
    "seeds": "seeds",
    "parent": "parent",
    "variances": "seed variances",
    "rate": "base %",
    "seed_sd": "seed sd",
    "fwer": "wrong verdict %",
    "coverage": "coverage %",
    "worst": "worst contrast %",
    "unpooled": "unpooled %",
    "mde": "MDE",
    "power": "power %",
    "uneven": "uneven %",
}


def markdown(rows: pandas.DataFrame) -> str:
    lines = ["| " + " | ".join(rows.columns) + " |", "|" + "---|" * len(rows.columns)]
    lines += [
        "| " + " | ".join(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row) + " |" for row in rows.to_numpy(object)
    ]
    return "\n".join(lines)


def summary(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Over base rates and seed sds: mean and largest rate of wrong verdicts, range of the others."""
    lines = []
    for (seeds, family, kind), part in rows.assign(kind=kinds(rows)).groupby(["seeds", "family", "kind"], sort=False):
        ends = {name: f"{part[name].min():.1f} to {part[name].max():.1f}" for name in ("coverage", "unpooled", "power")}
        lines.append(
            {
                "seeds": seeds,
                "family": family,
                "seed effects": kind,
                "settings": len(part),
                "wrong verdict %, mean": part["fwer"].mean(),
                "largest": part["fwer"].max(),
                "coverage %": ends["coverage"],
                "worst contrast %": part["worst"].min(),
                "unpooled %": ends["unpooled"],
                "power %": ends["power"],
            }
        )
    return pandas.DataFrame(lines)


def targets(rows: pandas.DataFrame) -> str:
    """Settings that miss the targets, by kind of seed variances: what the report must be honest about."""
    lines = ["\n## Targets\n", "How many settings are outside; a single setting may be, by chance.\n"]
    for even, part in rows.groupby("variances", sort=False):
        over = part["fwer"] > 100 * (ALPHA + 1.96 * np.sqrt(ALPHA * (1 - ALPHA) / part["families"]))
        low, high, off = part["coverage"] < 93, part["coverage"] > 97, (part["power"] - 80).abs() > 4
        lines.append(
            f"- {even} seed variances, {len(part)} settings: wrong verdicts above 5 % plus error in {over.sum()}; "
            f"coverage below 93 % in {low.sum()}, above 97 % in {high.sum()}; power beyond 80 +- 4 % in {off.sum()}."
        )
    return "\n".join(lines)


def kinds(rows: pandas.DataFrame) -> list[str]:
    return ["none" if row.seed_sd == 0 else f"{row.variances}, {row.parent} parent" for row in rows.itertuples()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=int, default=1000, help="simulated families for each setting")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scores", type=Path, nargs="+", help="score files of ifeval, to fit the difficulty of prompts on")
    parser.add_argument("--csv", type=Path, help="write the unrounded table here, too")
    given = parser.parse_args()
    difficulty, interaction = fitted(given.scores) if given.scores else (DIFFICULTY, INTERACTION)
    chosen = settings(difficulty, interaction)
    sequences = np.random.SeedSequence(given.seed).spawn(len(chosen))
    tasks = [(setting, given.families, sequence) for setting, sequence in zip(chosen, sequences, strict=True)]
    found = []
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # in the jobs: small matrices, and threads that spin
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        for number, row in enumerate(pool.map(simulate, tasks), start=1):
            found.append(row)
            print(f"\r{number} of {len(tasks)} settings", end="", file=sys.stderr, flush=True)
    rows = pandas.DataFrame(found)
    rows["rate"] = (100 * rows["rate"]).round().astype(int)
    if given.csv:
        rows.to_csv(given.csv, index=False)
    error, power_error = (100 * 1.96 * np.sqrt(share * (1 - share) / given.families) for share in (ALPHA, power.POWER))
    fit = "fitted on score files" if given.scores else "assumed"
    words = {
        "families": given.families,
        "settings": len(tasks),
        "prompts": PROMPTS,
        "jobs": given.jobs,
        "seed": given.seed,
        "fit": fit,
    }
    words |= {"difficulty": difficulty, "interaction": interaction, "error": error, "power_error": power_error}
    print(HEADER.format(**words))
    print(markdown(summary(rows)))
    print(targets(rows))
    print("\n## Each setting\n")
    print(markdown(rows[list(COLUMNS)].rename(columns=COLUMNS)))


HEADER = """# Do verdicts and intervals keep what they promise?

{families:,} families of binary verdicts are simulated for each of {settings} settings, and judged by the functions that
the report itself calls (`workflow_scripts/stats`). The model is crossed and logistic: mu of the arm + difficulty of the prompt +
prompt x arm + effect of the seed. mu is solved so that in a null family all true differences over the population of prompts and
seeds are exactly 0. {prompts} prompts; standard deviations on the logit scale: difficulty {difficulty:.2f}, prompt x arm
{interaction:.2f} ({fit}).

    PYTHONPATH=. python measurements/report_simulation.py --families {families} --jobs {jobs} --seed {seed}

- base %: accuracy of every arm in the null family. Seed sd: points of accuracy, of one run's own seed effect.
- parent: *shared*, children inherit their parent's seed effect and add their own (the reference is the parent; for all pairs
  the parent is not in the family); *independent*, they do not.
- seed variances: *unequal*, one arm has 2 times the seed sd, the first (the reference) 0.5 times.
- wrong verdict %: null families with any *better* or *worse*. At most 5 is promised; the simulation's error is {error:.1f}.
- coverage %: 95 % intervals that hold 0, over all contrasts; worst contrast %: of the contrast that is covered least; unpooled %:
  intervals from each contrast's own seed variance.
- MDE: true difference, in points, found with 80 % power at Holm's first step, from the true variances. Power %: how often the
  difference of the last arm to the first is found when it is that large (error {power_error:.1f}).
- uneven %: families in which the check of equal seed variances gives p <= 0.05.

## Summary
"""

if __name__ == "__main__":
    main()
