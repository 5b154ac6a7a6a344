"""Fair tuning: each method at its own best setting, by the same number of trials, chosen on data that nothing is judged by.

`tune:` declares copies of experiments, one for each point of a grid, and a choice among them: `dpo_t1`, `dpo_t2`, ... are `dpo`
at other rates, `dpo_tuned` is the adapter of one of them (steps/select.py). A point that is the experiment's own setting is the
experiment itself, and no copy. Only what the grid names differs; the constant blocks stand in no grid.
"""

import copy
import itertools
from dataclasses import dataclass, replace
from typing import Any

from workflow_scripts.artifacts.fingerprint import canonical
from workflow_scripts.config.names import EVALUATED, OBJECTIVE, PAIRED, RUN_NAME
from workflow_scripts.config.schema import CONSTANT_BLOCKS, of_method
from workflow_scripts.config.schema_errors import dotted
from workflow_scripts.config.written import Written, merge

GROUPS = ("train", "ppo")
# What a method is chosen by where no task chooses: one value of its held-out objective, and which way is good. Of preferences the
# accuracy: the loss of another beta is another loss, and a margin grows with the rate.
OBJECTIVES = {"sft": ("loss", "down"), **dict.fromkeys((*PAIRED, "kto"), ("accuracy", "up"))} | dict.fromkeys(
    ("ppo", "grpo", "rloo"), ("reward", "up")
)


@dataclass(frozen=True)
class Tuned:
    """What stands behind `dpo_tuned`."""

    of: str  # the experiment
    trials: dict[str, dict[str, Any]]  # trial -> its point of the grid: `train.learning_rate` -> value; the experiment may be one
    objective: bool  # chosen by the method's own objective
    declared: bool  # more or fewer trials than the others have, as the config declares


def expand(config: Written, resolved: dict[str, dict]) -> tuple[dict[str, dict], dict[str, Tuned]]:
    """(every resolved experiment, then trials and tuned ones; tuned experiment -> what stands behind it).

    InputError where a grid, a number of trials, a name or what chooses can't be used.
    """
    if "tune" not in config.data:
        return resolved, {}
    tune, experiments, tuned = config.data["tune"], dict(resolved), dict[str, Tuned]()
    check_prompts(config)
    for name, own in tune["experiments"].items():
        place = ["tune", "experiments", name]
        if name not in resolved:
            raise config.fail(place, f"found {name!r}, expected one of {', '.join(resolved)}")
        by_objective = own.get("choose", tune["choose"]) == OBJECTIVE
        _check_choice(config, [*place, "choose"], resolved[name], by_objective)
        at = [*place, "grid"] if "grid" in own else ["tune", "grid"]
        bodies = _bodies(config, at, own.get("grid", tune["grid"]), name, resolved[name])
        _check_number(config, name, at, len(bodies))
        made = f"{name}_tuned"
        trials: dict[str, dict] = {}
        for number, (point, body) in enumerate(bodies, 1):
            same = canonical(body) == canonical(resolved[name])
            trial = name if same else f"{name}_t{number}"
            _check_name(config, place, resolved, name, trial)
            experiments[trial], trials[trial] = body, point
        _check_name(config, place, resolved, name, made)
        experiments[made] = copy.deepcopy(resolved[name])
        tuned[made] = Tuned(name, trials, by_objective, "trials" in own and own["trials"] != tune["trials"])
    return experiments, tuned


def swept(tuned: dict[str, Tuned], copies: dict[str, str]) -> dict[str, Tuned]:
    """The tuned experiments with those that a rank sweep copies: `dpo_tuned_r8` is chosen among trials of rank 8."""
    found = dict(tuned)
    for made, original in copies.items():
        if original in tuned:
            end = made.removeprefix(original)
            trials = {f"{trial}{end}": point for trial, point in tuned[original].trials.items()}
            found[made] = replace(tuned[original], of=f"{tuned[original].of}{end}", trials=trials)
    return found


def trials(tuned: dict[str, Tuned]) -> dict[str, str]:
    """Trial -> the experiment that it is a copy of."""
    return {trial: body.of for body in tuned.values() for trial in body.trials if trial != body.of}


def place(config: Written, tuned: dict[str, Tuned], name: str, path: list) -> list | None:
    """Where a key of a trial or of a tuned experiment stands under `tune:`; None for one that is of the experiment itself."""
    for made, body in tuned.items():
        if made != name and (name not in body.trials or name == body.of):
            continue
        own = config.data["tune"]["experiments"].get(body.of, {})
        at = ["tune", "experiments", body.of, "grid"] if "grid" in own else ["tune", "grid"]
        if made == name and path[0] in ("trials", "by", "per_seed"):
            return {"trials": at, "by": ["tune", "choose"], "per_seed": ["tune", "per_seed"]}[path[0]]
        if made != name and dotted(path) in body.trials[name]:
            return [*at, *path]
    return None


def check_prompts(config: Written) -> None:
    """InputError unless what chooses is a task of the config, on a slice of its kind that no task is judged by."""
    if not (chosen := config.development):
        return
    at, slices, name = ["tune", "choose"], config.data["data"]["slices"], chosen["prompts"]
    if chosen["task"] not in config.evaluations:
        known = ", ".join(task for task in config.evaluations if task in ("ifeval", "gsm8k"))
        raise config.fail([*at, "task"], f"found {chosen['task']}, expected what `eval:` has: {known}")
    if slices.get(name, {}).get("kind") != (kind := EVALUATED[chosen["task"]]):
        raise config.fail([*at, "prompts"], f"found {name!r}, expected a slice of kind {kind}")
    for task, evaluated in config.evaluations.items():
        if name == evaluated or slices[name] == slices.get(evaluated):
            problem = (
                f"found {name!r}, which is what {task} is judged by: who chooses there can't be judged there; name a slice of "
            )
            raise config.fail([*at, "prompts"], problem + "other prompts")
    if "heldout" in slices[name]:
        problem = f"found {name!r}, which is trained on (it has `heldout`); name a slice of prompts that nothing trains on"
        raise config.fail([*at, "prompts"], problem)
    if "max_prompt_tokens" in slices[name]:
        problem = "development prompts are taken as they are; leave the key out"
        raise config.fail(["data", "slices", name, "max_prompt_tokens"], problem)


def _check_choice(config: Written, at: list, body: dict, by_objective: bool) -> None:
    if not by_objective and body["method"] == "rm":
        raise config.fail(
            at, "missing: a reward model answers no prompts; set `choose: objective`, its accuracy on held-out pairs"
        )
    kind = config.data["data"]["slices"].get(body["slice"], {}).get("kind")
    if by_objective and body["method"] == "kto" and kind == "unpaired":
        raise config.fail(at, "KTO on unpaired rows has no pairs to order, so no objective to choose by; choose by a task")


def _check_number(config: Written, name: str, at: list, found: int) -> None:
    """As many trials as all have, or as many as are declared for it alone."""
    tune = config.data["tune"]
    own = tune["experiments"][name].get("trials")
    if own is not None and found != own:
        raise config.fail(["tune", "experiments", name, "trials"], f"found {own}, and its grid has {found} points; make them one")
    if own is None and found != tune["trials"]:
        problem = (
            f"{found} points for {name}, and tune.trials gives every method {tune['trials']}: more trials are an advantage; "
        )
        raise config.fail(at, problem + f"take {tune['trials']}, or declare tune.experiments.{name}.trials: {found}")


def _check_name(config: Written, at: list, resolved: dict[str, dict], name: str, made: str) -> None:
    if made != name and made in resolved:
        raise config.fail(["experiments", made], f"`tune:` gives this name to what it makes of {name}; rename this experiment")
    if not RUN_NAME.fullmatch(made):
        problem = f"what is made of it would be called {made}, and a name has at most 41 characters; take a shorter one"
        raise config.fail(at, problem)


def _bodies(config: Written, at: list, grid: dict, name: str, body: dict) -> list[tuple[dict, dict]]:
    """(point, the experiment at this point) of a grid, the first key slowest. InputError on what it can't have."""
    keys = [(group, key) for group, tried in grid.items() for key in tried]
    for group, key in keys:
        _check_key(config, at, group, key)
    values = [_values(config, [*at, group, key], grid[group][key], name, body.get(group, {}).get(key)) for group, key in keys]
    found: list[tuple[dict, dict]] = []
    for chosen in itertools.product(*values):
        point = {f"{group}.{key}": value for (group, key), value in zip(keys, chosen, strict=True)}
        made = copy.deepcopy(body)
        for (group, key), value in zip(keys, chosen, strict=True):
            made = merge(made, {group: {key: value}})
        for path, problem in of_method(made):
            inside = [*at, *path[:2]] if dotted(path[:2]) in point or path[0] in grid else at
            raise config.fail(inside, f"{problem} (for {name})")
        if canonical(made) in [canonical(other) for _, other in found]:
            raise config.fail(
                at, f"two points are one setting for {name}: {canonical(point)}; a trial that is one again tells nothing"
            )
        found.append((point, made))
    return found


def _check_key(config: Written, at: list, group: str, key: str) -> None:
    blocks = {block: config.data[block] for block in CONSTANT_BLOCKS}
    if group in (*CONSTANT_BLOCKS, "optim", "quantise") or key in ("optim", *CONSTANT_BLOCKS, *itertools.chain(*blocks.values())):
        problem = (
            "refused: part of the constant block, which is one for all methods: trials of other capacity, base or optimiser "
        )
        raise config.fail([*at, group, key], problem + "would compare these (`sweep: rank` declares other ranks)")
    if group not in GROUPS:
        raise config.fail([*at, group], f"unknown key; known here: {', '.join(GROUPS)}")
    if key == "max_length":
        raise config.fail([*at, group, key], "refused: it decides which rows are whole, and trials would train on different rows")


def _values(config: Written, at: list, tried: list | dict, name: str, own: Any) -> list:
    """The values to try: as they are given, or multiples of the experiment's own."""
    if isinstance(tried, list):
        return tried
    if isinstance(own, bool) or not isinstance(own, int | float):
        what = "has none" if own is None else f"has {own!r}"
        raise config.fail(at, f"`times` multiplies an experiment's own number, and {name} {what}; give a list of values")
    if own == 0:
        raise config.fail(at, f"`times` multiplies an experiment's own number, and that of {name} is 0; give a list of values")
    return [_times(own, factor) for factor in tried["times"]]


def _times(own: int | float, factor: float) -> int | float:
    """0.3 x 5.0e-4 is 1.5e-4, and not 0.00014999999999999999; of a count a count, where it is whole."""
    value = float(f"{own * factor:.12g}")
    return int(value) if isinstance(own, int) and value.is_integer() else value
