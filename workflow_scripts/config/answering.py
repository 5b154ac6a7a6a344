"""Who answers: what `generation:` may ask for, given the rest of the config, and how it stands in a step."""

from workflow_scripts.artifacts import fingerprint
from workflow_scripts.config.written import Written

CORRECTED = ("grpo", "rloo")  # methods whose rollouts can be weighed (rl/correction.py)


def check(config: Written, experiments: dict[str, dict]) -> None:
    """InputError on the first key under `generation` that can't be done."""
    given = config.data["generation"]
    if given["rollouts"] == "vllm":
        problem = "found vllm, which answers evaluations alone: it would hold the base a second time beside the trainer, and has "
        problem += "no copy of an adapter but from files; set graphs, or hf"
        raise config.fail(["generation", "rollouts"], problem)
    if serves(config):
        _check_vllm(config)
    if given["correct"] != "none":
        _check_correction(config, experiments)


def serves(config: Written) -> bool:
    """Whether vLLM answers evaluations. `eval.decoding: folder` takes `hf` always: penalties are transformers' own."""
    return config.data["generation"]["backend"] == "vllm" and config.data["eval"]["decoding"] != "folder"


def _check_vllm(config: Written) -> None:
    backend, evaluation = ["generation", "backend"], config.data["eval"]
    if config.data["deterministic"]:
        problem = "found vllm with deterministic: true, which it can't promise; set graphs, or deterministic: false"
        raise config.fail(backend, problem)
    if config.data["device"] != "cuda":
        raise config.fail(backend, f"found vllm with device: {config.data['device']}; it needs device: cuda, or set graphs")
    if evaluation["precision"] == "fp32":
        raise config.fail(backend, "found vllm with eval.precision: fp32; its kernels for an adapter know bf16 and fp16 alone")
    if config.data["generation"]["adapter"] == "fp32":
        raise config.fail(["generation", "adapter"], "found fp32; vLLM rounds an adapter to the base's precision: set match")


def served(config: Written, step: dict, run: str) -> dict:
    """A step that may answer; with the versions of vLLM's own environment where that does. InputError on a base in 4-bit."""
    if step["config"].get("generation", {}).get("backend") != "vllm":
        return step
    if "quant" in step["config"]:
        problem = f"found vllm, but {run} is judged on its base in 4-bit, which vLLM would quantise in its own way; set graphs"
        raise config.fail(["generation", "backend"], problem)
    return step | {"packages": fingerprint.of_vllm(step["packages"])}


def _check_correction(config: Written, experiments: dict[str, dict]) -> None:
    place = ["generation", "correct"]
    if config.data["generation"]["rollouts"] == "hf":
        raise config.fail(
            place, "found truncated with rollouts: hf, which gives no log-probabilities of what it drew; set graphs"
        )
    for name, body in experiments.items():
        train = body["train"]
        if body["method"] in CORRECTED and (train["top_k"] or train["top_p"] < 1):
            problem = (
                f"found truncated, but {name} draws with top_k: {train['top_k']}, top_p: {train['top_p']}; the weights are of "
            )
            raise config.fail(place, f"{problem}draws from all tokens (top_k: 0, top_p: 1.0)")


def of_evaluations(config: Written) -> dict:
    """Who answers an evaluation's prompts, with what of it can change an answer: the batches of `hf`, the chunks of `vllm`, how
    `graphs` rounds an adapter."""
    given, evaluation = config.data["generation"], config.data["eval"]
    if serves(config):
        return {"backend": "vllm", "batch_size": given["chunk"]}
    if given["backend"] == "hf" or evaluation["decoding"] == "folder":
        return {"backend": "hf", "batch_size": evaluation["batch_size"]}
    return {"backend": "graphs", "adapter": "match" if evaluation["precision"] == "fp32" else given["adapter"]}


def correction(config: Written, method: str) -> dict:
    """What a training's step says of the weights of its rollouts: nothing where there are none."""
    given = config.data["generation"]
    return {"correction": given["cap"]} if given["correct"] == "truncated" and method in CORRECTED else {}
