"""A rank sweep: experiments again with adapters of other ranks, the one declared exception from the constant LoRA block.

`sweep: rank` on an experiment declares a copy for each of the config's `sweep_ranks`, of it and of every experiment that is
made from it by `start_from` or `reward`: `dpo_r8` is `dpo` with an adapter of rank 8, on the `sft_v2_r8` of its own rank.
`sweep: none` leaves an experiment out, and what is made from it. Only the rank differs: alpha/r, the scale of an adapter's update
(Hu et al. 2021, arXiv:2106.09685, section 4.1), dropout, bias and target modules are those of the global block. The experiments
themselves have its rank, and nothing of a sweep stands in their steps.
"""

import copy
from functools import cache

from workflow_scripts.config import sampled
from workflow_scripts.config.names import RUN_NAME
from workflow_scripts.config.written import Written


def expand(config: Written, resolved: dict[str, dict]) -> tuple[dict[str, dict], dict[str, str]]:
    """(every resolved experiment, copies last, without the key `sweep`; copy -> the experiment that it is a copy of).

    InputError where a rank or a name can't be used, or PPO would meet a reward model of another rank.
    """
    swept = _swept(config, resolved)
    experiments = {name: {key: body[key] for key in body if key != "sweep"} for name, body in resolved.items()}
    originals: dict[str, str] = {}
    for rank, block in _blocks(config).items() if swept else ():
        names = {name: f"{name}_r{rank}" for name in swept}
        slices = sampled.copied(config, names, f"_r{rank}")
        for name, made in names.items():
            if made in resolved:
                problem = f"`sweep: rank` gives this name to the copy of {name} with rank {rank}; rename this experiment, or "
                raise config.fail(["experiments", made], f"{problem}leave {name} out with `sweep: none`")
            if not RUN_NAME.fullmatch(made):
                problem = f"its copy with rank {rank} would be called {made}, and a name has at most 41 characters; take a "
                raise config.fail(["experiments", name], problem + "shorter one, or leave it out with `sweep: none`")
            _check_reward_models(config, resolved, name, swept)
            body = copy.deepcopy(experiments[name])
            body |= {"lora": block, "start_from": names.get(body["start_from"], body["start_from"])}
            body["slice"] = slices.get(body["slice"], body["slice"])
            if "reward" in body:
                body["reward"] = sampled.renamed(body["reward"], names)
            experiments[made], originals[made] = body, name
    return experiments, originals


def _swept(config: Written, experiments: dict[str, dict]) -> list[str]:
    """What is copied: by their own word, else where something that they are made from is, and nothing is left out."""

    @cache
    def told(name: str) -> bool | None:
        body = experiments[name]
        if "sweep" in body:
            return body["sweep"] == "rank"
        above = [told(parent) for parent in sampled.made_from(config, body) if parent in experiments]
        return False if False in above else True if True in above else None

    return [name for name in experiments if told(name)]


def _blocks(config: Written) -> dict[int, dict]:
    """Rank -> the LoRA block of the copies."""
    block, found = config.data["lora"], {}
    for rank in config.data["sweep_ranks"]:
        if rank == block["r"]:
            problem = f"found {rank}, which is lora.r, the rank of the experiments themselves; leave it out"
            raise config.fail(["sweep_ranks"], problem)
        alpha, rest = divmod(block["alpha"] * rank, block["r"])
        if rest:
            problem = f"found {rank}: alpha/r stays {block['alpha']}/{block['r']} in a sweep, and alpha would be no whole "
            raise config.fail(["sweep_ranks"], problem + "number; take another rank")
        found[rank] = block | {"r": rank, "alpha": alpha}
    return found


def _check_reward_models(config: Written, resolved: dict[str, dict], name: str, swept: list[str]) -> None:
    """PPO's adapters lie on one backbone, all with the rank of the policy's: its reward models are copied too."""
    body = resolved[name]
    for reward in _names(body["reward"]) if body["method"] == "ppo" else ():
        if reward in resolved and reward not in swept:
            problem = f"found {reward!r}, which the rank sweep leaves out, and PPO's policy and reward model have adapters of "
            problem += f"one rank; sweep it too, or leave {name} out with `sweep: none`"
            raise config.fail(config.place(name, ["reward"]), problem)


def _names(reward: str | dict) -> list[str]:
    return [reward] if isinstance(reward, str) else list(reward)
