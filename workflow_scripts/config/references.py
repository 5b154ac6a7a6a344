"""What one part of the config says of another: models, slices, starts and rewards that are named must be there, and fit."""

from collections.abc import Iterable

from workflow_scripts.config import bases, choices, declared, judged, losses, own_tasks, sampled, slices
from workflow_scripts.config.experiments import RANDOM, SHUFFLED, VERIFIERS, follow, rewards, slice_kinds
from workflow_scripts.config.names import EVALUATED
from workflow_scripts.config.written import Written


def check(config: Written, experiments: dict[str, dict], tuned: Iterable[str] = ()) -> None:
    """InputError on the first reference that leads nowhere, in a loop, or to something of another kind.

    tuned: experiments that `tune:` and `rounds:` make, and others may start from.
    """
    bases.check(config)
    choices.check(config)
    judged.check(config, experiments)
    own_tasks.check(config)
    if (config.data["device"], config.data["precision"]) == ("cpu", "fp16"):
        raise config.fail(["precision"], "found fp16 with device: cpu, where nothing scales its losses; set fp32")
    known = config.data["data"]["slices"]
    for task, slice_name in config.evaluations.items():
        if known.get(slice_name, {}).get("kind") != (kind := EVALUATED[task]):
            raise config.fail(["eval", task, "prompts"], f"found {slice_name!r}, expected a slice of kind {kind}")
        for key in ("heldout", "max_prompt_tokens"):
            if key in known[slice_name]:
                problem = "the prompts of an evaluation are taken as they are and are all held out; leave the key out"
                raise config.fail(["data", "slices", slice_name, key], problem)
    for place, body in [*((["eval", task], config.task(task)) for task in config.evaluations),
                        *((["eval", "tasks", name], body) for name, body in config.own_tasks.items())]:  # fmt: skip
        if ("samples" in body) != ("temperature" in body):
            missing = "temperature" if "samples" in body else "samples"
            problem = "missing, and it has no default: several answers to a prompt are drawn at a temperature, one is greedy"
            raise config.fail([*place, missing], problem)
    for name, body in known.items():
        slices.check(config, name, body)
    sampled.check(config)
    slices.check_parts(config, {body["slice"] for body in experiments.values()})
    for name, body in experiments.items():
        follow(config, name, "start_from", lambda one: _start(experiments, one), tuned)
        _check_start(config, experiments, name)
        _check_reward(config, experiments, name)
        losses.check(config, name, body)
        kinds, chosen = slice_kinds(body), body["slice"]
        fitting = ", ".join(sorted(key for key in known if config.trains_on(key) and known[key]["kind"] in kinds))
        if chosen not in known or not config.trains_on(chosen) or known[chosen]["kind"] not in kinds:
            problem = f"found {chosen!r}, expected a slice of kind {' or '.join(kinds)} to train on: "
            problem += fitting or "there is none yet"
            raise config.fail(config.place(name, ["slice"]), problem)
    for name in known:
        if found := sampled.block(config, name):
            check_names(config, experiments, ["data", "slices", name, "source", "sampled", "reward"], found)
            sampled.check_rewards(config, experiments, name)
    sampled.check_circles(config, experiments)


def _start(experiments: dict[str, dict], name: str) -> str | None:
    start = experiments[name]["start_from"]
    return None if start == "base" else start


def _check_start(config: Written, experiments: dict[str, dict], name: str) -> None:
    start = _start(experiments, name)
    if start is not None and experiments[start]["method"] == "rm":
        problem = f"found {start!r}, a reward model: it scores answers and writes none; start from another experiment"
        raise config.fail(config.place(name, ["start_from"]), problem)


def _check_reward(config: Written, experiments: dict[str, dict], name: str) -> None:
    """The rewards of an experiment are verifiers, declared, or reward models; none of them is made from the experiment itself."""
    body = experiments[name]
    place = config.place(name, ["reward"])
    check_names(config, experiments, place, body)
    if "reward" in body:
        _check_rollouts(config, name, body["train"])
    if "placebo" in body:
        path = ["ppo", "missing_eos_penalty"] if body["method"] == "ppo" else ["missing_eos_penalty"]
        if found := (body["ppo"] if body["method"] == "ppo" else body)["missing_eos_penalty"]:
            problem = f"found {found} with a placebo ({body['placebo']}): a penalty says something of the answer; set it to 0"
            raise config.fail(config.place(name, path), problem)
    for reward in rewards(body):
        if reward in VERIFIERS or reward in declared.names(config):
            continue
        if name in (chain := _made_from(experiments, reward)):
            loop = " -> ".join([name, *chain[: chain.index(name) + 1]])
            raise config.fail(place, f"a loop: {loop}; the reward model must start elsewhere")
        for key in ("start_from", "quantise") if body["method"] == "ppo" else ():
            if (theirs := experiments[reward][key]) != body[key]:
                problem = f"found {reward!r}, whose {key} is {theirs}, and that of {name} is {body[key]}; give both the same: "
                raise config.fail(place, problem + "PPO's policy and reward model lie on one backbone")


def check_names(config: Written, experiments: dict[str, dict], place: list, body: dict) -> None:
    """InputError where what an experiment, or a sampled slice, names under `reward` is no reward."""
    if len(verifiers := [reward for reward in rewards(body) if reward in VERIFIERS]) > 1:
        problem = f"found {' and '.join(verifiers)} in one mixture, but no row has what both need; take one experiment for each"
        raise config.fail(place, problem)
    for reward in rewards(body):
        if reward in VERIFIERS or reward in declared.names(config):
            continue
        models = ", ".join(one for one, other in experiments.items() if other["method"] == "rm")
        functions = ", ".join([*VERIFIERS, *declared.names(config)])
        known = f"expected {functions} or a reward model's experiment: {models or 'there is none yet'}"
        known += f" ({RANDOM} and {SHUFFLED} stand alone)" if reward in (RANDOM, SHUFFLED) else ""
        if reward not in experiments:
            raise config.fail(place, f"found {reward!r}, {known}")
        if (method := experiments[reward]["method"]) != "rm":
            raise config.fail(place, f"found {reward!r}, an experiment of method {method}, which is no reward model; {known}")


def _check_rollouts(config: Written, name: str, train: dict) -> None:
    """A batch holds whole groups of answers to one prompt: TRL says so only once the phases before are done."""
    steps = train.get("steps_per_generation", train["gradient_accumulation_steps"])
    if "num_generations" not in train:  # PPO
        if steps % (accumulated := train["gradient_accumulation_steps"]):
            problem = f"found {steps}, expected a multiple of gradient_accumulation_steps ({accumulated}): whole mini-batches"
            raise config.fail(config.place(name, ["train", "steps_per_generation"]), problem)
        return
    for size, group, times in (
        ("per_device_train_batch_size", "num_generations", steps),
        ("per_device_eval_batch_size", "num_generations_eval", 1),
    ):
        if train[size] * times % train[group]:
            rollout = f"{train[size]} x {times} answers" if times > 1 else f"{train[size]} answers"
            problem = f"found {train[size]}: a rollout of {rollout} must be a multiple of {group} ({train[group]})"
            raise config.fail(config.place(name, ["train", size]), problem)


def _made_from(experiments: dict[str, dict], name: str) -> list[str]:
    """`name` and every experiment that it is made from, by `start_from` and `reward`; each once, so that loops end."""
    found: list[str] = []
    todo = [name]
    while todo:
        one = todo.pop()
        if one in experiments and one not in found:
            found.append(one)
            body = experiments[one]
            todo += [body["start_from"], *(reward for reward in rewards(body) if reward not in VERIFIERS)]
    return found
