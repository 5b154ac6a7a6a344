"""What a report compares: the config's `report:` block, checked, and the runs that it needs. Plans; reads no result."""

from itertools import combinations, product

from workflow_scripts.config.config import Config
from workflow_scripts.config.names import JUDGED, run_name
from workflow_scripts.config.tuning import OBJECTIVES


def views(config: Config) -> list[str]:
    """The views (config/names.py) that the `report:` block names, such as `sft_v2_merged`: they are judged beside the runs."""
    report = config.data["report"]
    named = [name for family in report["families"].values() for name in [*family.get("runs", []), *family.get("pairs", [])]]
    named += [family["reference"] for family in report["families"].values() if "reference" in family]
    named += [name for _, *pair in controls(config) for name in pair]
    return list(dict.fromkeys(name for name in named if name in config.judged and config.view(name)[1]))


def answering(config: Config) -> list[str]:
    """What has answers: the models that are not trained here, and every experiment that is no reward model and no trial."""
    trained = [name for name, body in config.experiments.items() if body["method"] != "rm" and name not in config.trials]
    return [*config.models, *trained]


def verdict_tasks(config: Config) -> list[str]:
    """The tasks that have verdicts: all but the rewards of a judge."""
    return [task for task in config.scored if task != JUDGED]


def controls(config: Config) -> list[tuple[str, str, str]]:
    """(control, run, what it is compared with) of what `report.controls` declares; the null control is compared with itself."""
    declared = config.data["report"]["controls"]
    found = [(name, one["run"], one.get("against", one["run"])) for name, one in declared.items() if name != "placebo"]
    placebo = declared.get("placebo", {"runs": []})
    return found + [("placebo", run, placebo["against"]) for run in placebo["runs"]]


def check(config: Config) -> None:
    """InputError if the `report:` block names what the config does not have."""
    if "report" not in config.data:
        return
    report, known = config.data["report"], [*answering(config), *config.judged]

    def named(path: list, *names: str) -> None:
        for name in names:
            if name in known and (trial := config.view(name)[0]) in config.trials:
                problem = (
                    f"found {name!r}, a trial: it is judged by what chooses, and never beside verdicts; name the tuned one, or "
                )
                raise config.fail(
                    ["report", *path], f"{problem}declare an experiment of its own that extends {config.trials[trial]}"
                )
            if name not in known:
                some = ", ".join(answering(config))
                raise config.fail(["report", *path], f"found {name!r}, expected one of {some}, or a view of one (_merged, _nf4)")

    families = list(report["families"])
    if "confirmatory" not in report and len(families) > 1:
        problem = f"not given, and there are {len(families)} families; name the one whose verdicts count, before you see any: "
        raise config.fail(["report", "confirmatory"], problem + ", ".join(families))
    if report.get("confirmatory", families[0]) not in families:
        problem = f"found {report['confirmatory']!r}, expected one of the families: {', '.join(families)}"
        raise config.fail(["report", "confirmatory"], problem)
    for name, family in report["families"].items():
        path = ["families", name]
        judged = verdict_tasks(config)
        if family["task"] not in judged:
            tasks = ", ".join(judged)
            raise config.fail(["report", *path, "task"], f"found {family['task']!r}, expected what `eval:` has: {tasks}")
        for key in ("runs", "pairs"):
            named([*path, key], *family.get(key, []))
        named([*path, "reference"], *([family["reference"]] if "reference" in family else []))
        if family.get("reference") in family.get("runs", []):
            raise config.fail(
                ["report", *path, "runs"], f"{family['reference']} is the reference: it can't be compared with itself"
            )
        against = [family["reference"]] if "reference" in family else []
        _check_capacity(config, path, [*combinations(family.get("pairs", []), 2), *product(family.get("runs", []), against)])
    for control, run, other in controls(config):
        named(["controls", control], run, other)
        if control != "null" and run == other:
            problem = f"found {other!r}, which is the run itself: such a control can't fail; name another"
            raise config.fail(["report", "controls", control, "against"], problem)
        _check_capacity(config, ["controls", control], [(run, other)])
    _check_placebos(config)
    null, seeds = report["controls"].get("null"), config.data["seeds"]
    if null and config.view(null["run"])[0] in config.models:
        problem = f"found {null['run']!r}, which is not trained here and has no seeds; name an experiment"
        raise config.fail(["report", "controls", "null", "run"], problem)
    if null and {seed + null["seeds_from"] for seed in seeds} & set(seeds):
        problem = f"{null['seeds_from']} added to seeds {seeds} gives some of them again; take a larger number"
        raise config.fail(["report", "controls", "null", "seeds_from"], problem)


def _check_placebos(config: Config) -> None:
    placebo, path = config.data["report"]["controls"].get("placebo"), ["report", "controls", "placebo"]
    if placebo is None:
        return
    tasks = verdict_tasks(config)
    if placebo["task"] not in tasks:
        problem = f"found {placebo['task']!r}, expected what `eval:` has: {', '.join(tasks)}"
        raise config.fail([*path, "task"], problem)
    for run in placebo["runs"]:
        if "placebo" not in config.experiments.get(config.view(run)[0], {}):
            problem = f"found {run!r}, which is no placebo; name experiments with `reward: random` or `reward: {{shuffled: ...}}`"
            raise config.fail([*path, "runs"], problem)


def _check_capacity(config: Config, path: list[str], pairs: list[tuple[str, str]]) -> None:
    """InputError where a family or a control compares methods whose adapters have different ranks."""
    for one, other in pairs:
        if not _comparable(config, one, other):
            found = " and ".join(f"{name} (r {config.lora(config.view(name)[0])['r']})" for name in (one, other))
            problem = f"found {found}: methods are compared at equal adapter capacity; name both at one rank, or one experiment "
            raise config.fail(["report", *path], problem + "at several")


def _comparable(config: Config, one: str, other: str) -> bool:
    """False for two experiments of different ranks, unless both are one experiment: there capacity is what is compared."""
    one, other = (config.view(name)[0] for name in (one, other))
    if {one, other} & set(config.models) or config.lora(one)["r"] == config.lora(other)["r"]:
        return True
    return config.copies.get(one, one) == config.copies.get(other, other)


def ranks(config: Config) -> dict[str, dict]:
    """Of each experiment that a sweep copies, and of each copy: `of`, the experiment itself, and `r`. {} without a sweep."""
    originals = {name: name for name in config.copies.values()} | config.copies
    return {name: {"of": original, "r": config.lora(name)["r"]} for name, original in originals.items()}


def tuned(config: Config) -> dict:
    """What the report is told of `tune:`: who was chosen from what, by what, and whether the evaluation's curve is shown."""
    tune = config.data["tune"]
    experiments = {
        name: {"of": body.of, "trials": list(body.trials.items()), "objective": body.objective, "declared": body.declared}
        for name, body in config.tuned.items()
    }
    objectives = {
        trial: OBJECTIVES[config.experiments[trial]["method"]][0]
        for body in config.tuned.values()
        for trial in body.trials
        if body.objective
    }
    told = {"experiments": experiments, "per_seed": tune["per_seed"], "curve": tune.get("curve", False), "objectives": objectives}
    return told | config.development


def null_runs(config: Config) -> list[str]:
    """The runs of the null control: one experiment again, with seeds of its own."""
    null = config.data["report"]["controls"].get("null")
    return [run_name(null["run"], seed + null["seeds_from"]) for seed in config.data["seeds"]] if null else []


def runs(config: Config) -> list[str]:
    """Every run whose answers the report reads."""
    of_models = [name for name in views(config) if config.view(name)[0] in config.models]
    trained = [name for name in [*answering(config), *views(config)] if name not in {*config.models, *of_models}]
    seeded = [run_name(name, seed) for name in trained for seed in config.data["seeds"]]
    return list(dict.fromkeys([*config.models, *of_models, *seeded, *null_runs(config)]))


def reward_models(config: Config) -> list[str]:
    names = [name for name, body in config.experiments.items() if body["method"] == "rm" and name not in config.trials]
    return [run_name(name, seed) for name in names for seed in config.data["seeds"]]
