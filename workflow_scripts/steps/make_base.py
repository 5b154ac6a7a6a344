"""Make the base model: a Hugging Face folder with weights, tokenizer and chat template, and a manifest of their sha256.

Source `scratch`: the tiny world's model, its tokenizer trained and its weights pretrained here. Documents that share a prompt
with the evaluation are refused, so that no evaluation prompt was ever seen.
Sources `path` (a local Hugging Face folder), `gguf` (a file, dequantised) and `hub` (an id at a revision): the model as it is,
in one safetensors file in the declared dtype, with the chat template that it trains with (models/templates.py). No token is
added.

    python -m workflow_scripts.steps.make_base --step results/base/manifest.json --out trial/manifest.json \\
        --inputs results/data/ifeval.manifest.json

For `path` and `gguf`, `--inputs` names the folder or the file.
"""

from pathlib import Path
from typing import Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import cli

TRIED = 1000  # documents on which the saved tokenizer must be the one that was trained: the tiny world has no more to show


def main(job: manifests.Job) -> None:
    parents = job.parents()
    if job.config["source"] == "scratch":
        model, tokenizer, texts = pretrained_here(job, parents)
        facts: dict = {}
    else:
        model, tokenizer, texts, facts = imported(job)
    with manifests.complete(job, "base", parents) as draft:
        model.save_pretrained(draft.folder, max_shard_size="1000GB")
        tokenizer.save_pretrained(draft.folder)
        check_saved(draft.folder, tokenizer, texts, job.out)
        draft.manifest |= {
            "source": job.config["source"],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "end_of_turn": tokenizer.eos_token,
            **facts,
        }


def pretrained_here(job: manifests.Job, parents: dict[str, manifests.Artifact]) -> tuple[Any, Any, list[str]]:
    """(model, tokenizer, texts to try the saved tokenizer on) of the tiny world."""
    from workflow_scripts.models import chat, device
    from workflow_scripts.plumbing.progress import Progress
    from workflow_scripts.tiny import pretrain, world

    config = job.config["scratch"]
    prompts = {row["prompt"] for row in parents["prompts"].rows()}
    documents = world.documents(seed=config["seed"], **config["documents"])
    if seen := prompts & {row["messages"][0]["content"] for row in documents}:
        raise InputError(f"{job.out}: {len(seen)} evaluation prompts are among the pretraining documents, such as {min(seen)!r}")
    device.prepare(job.step | {"seed": config["seed"], "device": "cpu"})  # a million parameters: a GPU would not help
    bar = Progress(config["train"]["steps"], "pretraining")
    model, tokenizer = pretrain.build(
        {key: config[key] for key in ("documents", "tokenizer", "model", "train")}, config["seed"],
        progress=lambda done, total, loss: bar.step(done, f"loss {loss:.3f}"),
    )  # fmt: skip
    bar.close()
    chat.end_of_turn(tokenizer)
    tried = documents[:TRIED]
    return model, tokenizer, [str(tokenizer.apply_chat_template(row["messages"], tokenize=False)) for row in tried]


def imported(job: manifests.Job) -> tuple[Any, Any, list[str], dict]:
    """(model in the declared dtype, tokenizer with its training template, texts to try it on, facts for the manifest)."""
    from transformers.utils import logging

    from workflow_scripts.models import sources, templates
    from workflow_scripts.models.device import DTYPES

    logging.disable_progress_bar()
    config, facts = job.config, {}
    if config["source"] == "gguf":
        file = given(job, config["gguf"]["file"])
        sources.check_gguf(file, config["gguf"]["sha256"])
        model, tokenizer = sources.from_gguf(file)
    elif config["source"] == "path":
        folder = given(job, config["path"])
        if sources.content_sha256(sources.folder_hashes(folder)) != job.step["external"]["content"]:
            raise InputError(f"{folder}: changed since this step was planned; run snakemake again")
        model, tokenizer = sources.from_folder(folder, DTYPES[config["dtype"]])
    else:
        folder, commit = sources.from_hub(config["hub"]["id"], config["hub"].get("revision"))
        model, tokenizer = sources.from_folder(folder, DTYPES[config["dtype"]])
        facts = {"revision": commit, "pinned": "revision" in config["hub"]}
    facts |= {"dtype": config["dtype"]}
    facts["template"] = templates.install(tokenizer, config.get("training_template"), config.get("end_of_turn"))
    settle(model, tokenizer, config["dtype"], job.out)
    talks = [templates.rendered(tokenizer, tokenizer.chat_template, turns) for turns in templates.SINGLE + templates.SEVERAL]
    texts = [text for text in talks if text is not None]  # some templates take no system turn
    return model, tokenizer, texts + ["Two  spaces,\n\n\tand don't 12,345 cafés 日本語 🙂."], facts


def given(job: manifests.Job, name: str) -> Path:
    """The input of that name: a folder or a file that the config names by its path."""
    for path in job.inputs:
        if path.name == name:
            return path
    raise InputError(f"{job.out}: expected {name} among the inputs, which name the model's folder or file")


def settle(model: Any, tokenizer: Any, dtype: str, out: Path) -> None:
    """Cast to `dtype`; model, generation and tokenizer agree on the tokens that end and pad. InputError if one has no row."""
    from workflow_scripts.models import chat
    from workflow_scripts.models.device import DTYPES

    model.to(DTYPES[dtype])
    rows = model.get_input_embeddings().num_embeddings
    if (largest := max(tokenizer.get_vocab().values())) >= rows:
        raise InputError(
            f"{out}: the tokenizer has a token {largest}, the model's embeddings have {rows} rows; they do not belong together"
        )
    check_end_is_trained(model, tokenizer, out)
    more = chat.declared_ends(model.generation_config, model.config)
    ends = list(dict.fromkeys([tokenizer.eos_token_id, *more]))  # the end of a turn first: what a model declares ends answers too
    for part in (model.config, model.generation_config):
        part.eos_token_id = ends if len(ends) > 1 else ends[0]
        part.pad_token_id = tokenizer.pad_token_id


def check_end_is_trained(model: Any, tokenizer: Any, out: Path) -> None:
    """InputError if the model can never write the token that ends its turns: its row of the output embeddings is zero.

    Some base models have tokens for turns that no training has touched (those of Llama 3 are below 1e-16). A LoRA block on the
    linear layers leaves that row as it is, and its logit at 0: each answer would run to the limit.
    """
    import torch

    rows, end = model.get_output_embeddings().weight.detach(), tokenizer.eos_token_id
    if float(rows[end].abs().max()) <= 1e-6 * float(rows.abs().mean(dtype=torch.float32)):
        raise InputError(
            f"{out}: the end of a turn, {tokenizer.eos_token!r} (token {end}), was never trained in this model: its row of the "
            "output embeddings is zero, and adapters leave it so; no answer would end. Take a model that knows it (the Instruct "
            "one), or a template that closes turns with a token that the model knows, named under base.end_of_turn"
        )


def check_saved(folder: Path, tokenizer: Any, texts: list[str], out: Path) -> None:
    """InputError unless the saved tokenizer is read back as the same: transformers may load it as the class of the model's
    family, with other rules for splitting text."""
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if saved(texts)["input_ids"] != tokenizer(texts)["input_ids"]:
        raise InputError(f"{out}: the tokenizer, saved and loaded again, gives other tokens")


if __name__ == "__main__":
    cli.run(main, __doc__)
