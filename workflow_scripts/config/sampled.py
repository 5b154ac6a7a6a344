"""Slices whose rows a run of this config makes itself: `source: {sampled: ...}`. What they ask of other keys, circles, rounds.

Two steps stand behind one: the answers (steps/sample.py) and the choice among them (steps/choose_rows.py). With `answers_of` a
slice takes the answers of another one. Such a slice is of a seed, as the run that answers: the rows of `dpo.seed2` come from
`sft_v2.seed2`, judged by `rm.seed2`.
"""

import copy
from typing import Any

from workflow_scripts.config.experiments import VERIFIERS, rewards, with_placebo
from workflow_scripts.config.names import RUN_NAME, view_of
from workflow_scripts.config.written import Written

ASKING = ("run", "prompts", "n", "temperature", "max_new_tokens")  # keys of the answers, and those that may be left out
MAY_ASK = ("top_p", "top_k")
KINDS = {"best": "sft", "all_right": "sft", "pairs": "preference", "labels": "unpaired"}  # `keep` -> the slice's kind
ASKED = ("preference", "unpaired", "numeric", "ifeval", "prompts")  # kinds of slices whose prompts can be answered


def block(config: Written, name: str) -> dict:
    """The `sampled` block of a slice, a placebo beside its reward as in an experiment; {} for a slice of another source."""
    return with_placebo(config.slice_body(name)["source"].get("sampled", {}))


def asking(config: Written, name: str) -> tuple[str, dict]:
    """(the slice whose answers a sampled slice takes, without a seed; what is asked there, with `rows` and `seed`)."""
    name = block(config, name).get("answers_of", name.partition(".")[0])
    body = config.slice_body(name)
    asked = {key: body["source"]["sampled"][key] for key in (*ASKING, *MAY_ASK) if key in body["source"]["sampled"]}
    return name, asked | {key: body[key] for key in ("rows", "seed")}


def made_from(config: Written, body: dict) -> list[str]:
    """What a resolved experiment starts from, learns from and is rewarded by: experiments, and names of no experiment."""
    return [body["start_from"], *rewards(body), *(_of_slice(config, body["slice"]) if body["slice"] in _known(config) else [])]


def _of_slice(config: Written, name: str) -> list[str]:
    found = block(config, name)
    return [view_of(asking(config, name)[1]["run"])[0], *rewards(found)] if found else []


def _known(config: Written) -> dict[str, dict]:
    return config.data["data"]["slices"]


def place(config: Written, name: str, path: list[str]) -> list[str]:
    """Where a key of a sampled slice was written: a copy's in what it is a copy of, that of the answers in their slice."""
    name = name.partition(".")[0]
    name = config.slice_copies.get(name, name)
    if path[-1] in (*ASKING, *MAY_ASK):
        name = asking(config, name)[0]
    return ["data", "slices", name, *path]


# -- checks --------------------------------------------------------------------------------------------------------------


def check(config: Written) -> None:
    """InputError on a sampled slice whose keys do not fit each other, or that names a slice that it can't ask."""
    for name, body in _known(config).items():
        if "sampled" not in body["source"]:
            continue
        path, found = ["data", "slices", name, "source", "sampled"], body["source"]["sampled"]
        _check_answers(config, name, path, found)
        _check_prompts(config, name, path)
        if body["kind"] != (kind := KINDS[found["keep"]]):
            raise config.fail([*path[:3], "kind"], f"found {body['kind']}, expected {kind}: the rows of keep: {found['keep']}")
        if "format" in body:
            raise config.fail([*path[:3], "format"], "not for rows that a run makes; leave it out")
        needs = {"all_right": {"least"}, "labels": {"least"}, "pairs": {"pair"}}.get(found["keep"], set())
        needs = needs | ({"margin"} if found.get("pair") == "margin" else set())
        for key in ("least", "pair", "margin"):
            if key in needs and key not in found:
                raise config.fail([*path, key], f"missing: keep: {found['keep']} needs it")
            if key in found and key not in needs and (key, found["keep"]) != ("least", "best"):
                of = "pair: margin" if key == "margin" else "keep: pairs" if key == "pair" else "keep: best, all_right or labels"
                raise config.fail([*path, key], f"of {of}; leave it out")


def check_rewards(config: Written, experiments: dict[str, dict], name: str) -> None:
    """InputError unless a slice that a reward model chooses says what that has to be worth. Its rewards are experiments."""
    found, key = block(config, name), "require_reward_above_chance"
    models = [reward for reward in rewards(found) if reward in experiments]
    if bool(models) != (key in found):
        problem = (
            f"missing: {models[0]} is a reward model; true refuses one that is no better than chance" if models else "of a reward"
        )
        problem += "" if models else " model; leave it out"
        raise config.fail(["data", "slices", name, "source", "sampled", key], problem)


def _check_answers(config: Written, name: str, path: list, found: dict) -> None:
    """Either the slice says how to ask, or whose answers it takes."""
    if "answers_of" not in found:
        if missing := [key for key in ASKING if key not in found]:
            problem = "missing, and it has no default; a sampled slice has it, or `answers_of: <slice>`"
            raise config.fail([*path, missing[0]], problem)
        if found["keep"] == "pairs" and found["n"] < 2:
            raise config.fail([*path, "n"], f"found {found['n']}, expected at least 2: a pair is two answers to one prompt")
        return
    if twice := [key for key in (*ASKING, *MAY_ASK) if key in found]:
        raise config.fail([*path, twice[0]], f"is that of {found['answers_of']}, whose answers are taken; leave it out")
    own = [one for one, body in _known(config).items() if "answers_of" not in body["source"].get("sampled", {"answers_of": ""})]
    if found["answers_of"] not in own:
        known = ", ".join(own) or "there is none yet"
        problem = f"found {found['answers_of']!r}, expected a sampled slice with answers of its own: {known}"
        raise config.fail([*path, "answers_of"], problem)
    mine, theirs = _known(config)[name], _known(config)[found["answers_of"]]
    for key in ("rows", "seed"):
        if mine[key] != theirs[key]:
            problem = f"found {mine[key]}, and {theirs[key]} in {found['answers_of']}, whose answers are taken; write the same"
            raise config.fail([*path[:3], key], problem)


def _check_prompts(config: Written, name: str, path: list) -> None:
    """The slice that is asked has prompts, as many as are asked for, that nothing is judged by, and what the reward reads."""
    owner, asked = asking(config, name)
    known, place = _known(config), ["data", "slices", owner, "source", "sampled", "prompts"]
    judged, chosen = {slice_: task for task, slice_ in config.asked.items()}, asked["prompts"]
    fitting = [
        one for one, body in known.items() if body["kind"] in ASKED and one not in judged and "sampled" not in body["source"]
    ]
    if chosen in judged:
        raise config.fail(place, f"found {chosen!r}, the prompts of {judged[chosen]}: what is judged there can't be trained on")
    if chosen not in fitting:
        raise config.fail(place, f"found {chosen!r}, expected a slice with prompts: {', '.join(fitting) or 'there is none yet'}")
    if asked["rows"] > known[chosen]["rows"]:
        problem = f"found {asked['rows']}, and {chosen}, whose prompts are asked, has {known[chosen]['rows']} rows; lower it"
        raise config.fail([*place[:3], "rows"], problem)
    body, kind = known[name], known[chosen]["kind"]
    if "group_by" in body and body["group_by"] != known[chosen].get("group_by"):
        problem = f"found {body['group_by']!r}, expected what {chosen} has, whose prompts are asked"
        raise config.fail([*path[:3], "group_by"], f"{problem}: {known[chosen].get('group_by', 'nothing')}")
    if needed := [reward for reward in rewards(block(config, name)) if reward in VERIFIERS and reward != kind]:
        problem = f"found {needed[0]}, which needs prompts of kind {needed[0]}, and {chosen} is of kind {kind}"
        raise config.fail([*path, "reward"], problem)


def check_circles(config: Written, experiments: dict[str, dict]) -> None:
    """InputError, with the path, where a slice is made by a run that is made from it."""
    done: set[tuple[str, str]] = set()

    def above(node: tuple[str, str]) -> list[tuple[str, str]]:
        kind, name = node
        if kind == "slice":
            return [("", one) for one in _of_slice(config, name) if one in experiments]
        body = experiments[name]
        own = [("", one) for one in (body["start_from"], *rewards(body)) if one in experiments]
        return own + ([("slice", body["slice"])] if block(config, body["slice"]) else [])

    def visit(node: tuple[str, str], path: list[tuple[str, str]]) -> None:
        if node in path:
            loop = [*path[path.index(node) :], node]
            made = next((name for kind, name in loop if kind), "")
            words = " -> ".join(f"{name} (a slice)" if kind else name for kind, name in loop)
            key = "answers_of" if "answers_of" in block(config, made) else "run"
            problem = f"a circle: {words}; let another run answer"
            raise config.fail(["data", "slices", made, "source", "sampled", key], problem)
        if node not in done:
            for one in above(node):
                visit(one, [*path, node])
            done.add(node)

    for name in experiments:
        visit(("", name), [])


# -- rounds --------------------------------------------------------------------------------------------------------------


def in_rounds(config: Written, resolved: dict[str, dict]) -> tuple[dict[str, dict], dict[str, str]]:
    """(the experiments without the key `rounds`, and those of later rounds; later round -> the experiment that asks for it).

    Round k starts from round k - 1, on a slice of its own name whose answers that one gave: to prompts drawn by another seed, the
    slice's plus k - 1, where it draws some of them. All else is as in the first round.
    """
    experiments: dict[str, dict] = {}
    made: dict[str, str] = {}
    for name, body in resolved.items():
        count = body.get("rounds", 1)
        experiments[name] = {key: value for key, value in body.items() if key != "rounds"}
        if count == 1:
            continue
        place, slice_ = config.place(name, ["rounds"]), body["slice"]
        source = _known(config).get(slice_, {}).get("source", {}).get("sampled")
        if source is None:
            raise config.fail(place, f"found {count}, but {slice_}, on which it trains, is no sampled slice: nothing goes round")
        _, asked = asking(config, slice_)
        run, view = view_of(asked.get("run", ""))
        if run != body["start_from"]:
            problem = (
                f"found {count}, but {slice_} has answers of {run}, and {name} starts from {body['start_from']}: name one run"
            )
            raise config.fail(place, problem)
        before = name
        for number in range(2, count + 1):
            one = f"{name}_round{number}"
            if one in resolved or one in _known(config) or one in config.models or not RUN_NAME.fullmatch(one):
                raise config.fail(place, f"round {number} and its slice would be called {one}, which is too long, or taken")
            experiments[one] = copy.deepcopy(experiments[name]) | {"start_from": before, "slice": one}
            sampled = {key: asked[key] for key in (*ASKING, *MAY_ASK) if key in asked}
            sampled |= {key: value for key, value in source.items() if key != "answers_of"}
            sampled["run"] = f"{before}_{view}" if view else before
            own: dict[str, Any] = copy.deepcopy(_known(config)[slice_]) | {"source": {"sampled": copy.deepcopy(sampled)}}
            _known(config)[one] = own | {"seed": asked["seed"] + number - 1}
            config.slice_copies[one] = slice_
            made[one] = name
            before = one
    return experiments, made


# -- copies of a rank sweep ------------------------------------------------------------------------------------------------


def copied(config: Written, names: dict[str, str], end: str) -> dict[str, str]:
    """Slice -> its copy, of those whose answers or rewards come from experiments that are copied; the copies stand in the config.

    names: experiment -> its copy; end: what the names of copies end with.
    """
    slices = _known(config)
    found = {one: f"{one}{end}" for one in slices if set(_of_slice(config, one)) & {*names}}
    for one, made in found.items():
        if made in slices or not RUN_NAME.fullmatch(made):
            problem = f"its copy for the rank sweep would be called {made}, which is taken, or has more than 41 characters"
            raise config.fail(["data", "slices", one], f"{problem}; rename it")
    bodies = {made: copy.deepcopy(slices[one]) for one, made in found.items()}
    for body in bodies.values():
        source = body["source"]["sampled"]
        if "answers_of" in source:
            source["answers_of"] = found.get(source["answers_of"], source["answers_of"])
        else:
            run, view = view_of(source["run"])
            source["run"] = names.get(run, run) + (f"_{view}" if view else "")
        source["reward"] = renamed(source["reward"], names)
    slices |= bodies
    config.slice_copies |= {made: config.slice_copies.get(one, one) for one, made in found.items()}
    return found


def renamed(reward: str | dict, names: dict[str, str]) -> str | dict:
    """A reward or a mixture with the reward models that have copies; a verifier, and what has no copy, stays."""
    if isinstance(reward, str):
        return names.get(reward, reward)
    if isinstance(reward.get("shuffled"), str):
        return {"shuffled": names.get(reward["shuffled"], reward["shuffled"])}
    return {names.get(name, name): weight for name, weight in reward.items()}
