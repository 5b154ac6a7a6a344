"""Experiments resolved: each laid over what it extends, and that over the defaults of its method; then what they refer to."""

from collections.abc import Callable, Iterable

from workflow_scripts.config.names import PAIRED
from workflow_scripts.config.written import Written, merge

# Method -> kinds of the slices that it trains on. Methods with a reward take what their rewards need (`slice_kinds`).
SLICE_KINDS = {"sft": ("sft",), "kto": ("preference", "unpaired"), **dict.fromkeys(PAIRED, ("preference",))}
# Rewards that say nothing of an answer (rl/placebos.py): `placebo` of a resolved experiment.
RANDOM, SHUFFLED = "random", "shuffled"
# Rewards that are functions -> the evaluation that judges as they do. Each needs the fields of the slice kind of its name.
VERIFIERS = {"ifeval": "ifeval", "numeric": "gsm8k"}


def lay(base: dict, over: dict) -> dict:
    """`merge` for experiments: a reward, like class weights, replaces that of the base whole, since a mixture is one choice."""
    whole = {key: over[key] for key in ("reward", "class_weights") if key in over}
    return merge(base, over) | whole


def rewards(body: dict) -> dict[str, float]:
    """Reward -> weight of a resolved experiment: `reward: numeric` is a weight of 1. None without a reward, or for a coin."""
    reward = body.get("reward", {})
    if body.get("placebo") == RANDOM:
        return {}
    return {reward: 1.0} if isinstance(reward, str) else dict(sorted(reward.items()))


def slice_kinds(body: dict) -> tuple[str, ...]:
    """The kinds of slices that a resolved experiment can train on. A verifier needs its own; a reward model only prompts."""
    if "reward" not in body:
        return SLICE_KINDS[body["method"]]
    needed = tuple(reward for reward in rewards(body) if reward in VERIFIERS)
    return needed or ("preference", "unpaired", "numeric", "ifeval")


def resolve(config: Written) -> dict[str, dict]:
    """Name -> the whole experiment, without `extends`. InputError on an unknown parent, a loop, or a missing method."""
    return {name: _resolve(config, name) for name in sorted(config.data["experiments"])}


def _resolve(config: Written, name: str) -> dict:
    experiments = config.data["experiments"]
    body: dict = {}
    for ancestor in reversed(follow(config, name, "extends", lambda one: experiments[one].get("extends"))):
        body = lay(body, experiments[ancestor])
    body.pop("extends", None)
    if "method" not in body:
        raise config.fail(["experiments", name, "method"], "missing; name a method, or an experiment with `extends:`")
    return with_placebo(lay(config.data["methods"][body["method"]], body))


def with_placebo(body: dict) -> dict:
    """A reward that is shuffled stands under its own name, with `placebo` beside it, so that it is read as any other."""
    reward = body.get("reward")
    if reward == RANDOM:
        return body | {"placebo": RANDOM}
    if isinstance(reward, dict) and [*reward] == [SHUFFLED]:
        return body | {"placebo": SHUFFLED, "reward": reward[SHUFFLED]}
    return body


def follow(config: Written, name: str, key: str, parent_of: Callable[[str], str | None], more: Iterable[str] = ()) -> list[str]:
    """`name` and the experiments that it reaches by `key`. InputError, naming the key, on unknown names and loops.

    more: names that stand for experiments without being written as such.
    """
    chain, there = [name], {*config.data["experiments"], *more}
    while (parent := parent_of(chain[-1])) is not None:
        if parent not in there:
            known = ", ".join([*(["base"] if key == "start_from" else []), *sorted(there)])
            raise config.fail(config.place(chain[-1], [key]), f"found {parent!r}, expected one of {known}")
        if parent in chain:
            loop = " -> ".join([*chain[chain.index(parent) :], parent])
            raise config.fail(config.place(chain[-1], [key]), f"a loop: {loop}; one of them must start elsewhere")
        chain.append(parent)
    return chain
