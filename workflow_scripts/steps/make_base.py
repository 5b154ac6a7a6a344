"""Make the base model: a Hugging Face folder with weights, tokenizer and chat template, and a manifest of their sha256.

Source `scratch`: the tiny world's model, its tokenizer trained and its weights pretrained here. Documents that share a prompt
with the evaluation are refused, so that no evaluation prompt was ever seen.

    python -m workflow_scripts.steps.make_base --step results/base/manifest.json --out trial/manifest.json \\
        --inputs results/data/ifeval.manifest.json
"""

from workflow_scripts.core import artifacts, cli


def main(job: artifacts.Job) -> None:
    from transformers import AutoTokenizer

    from workflow_scripts.core import chat, device
    from workflow_scripts.core.messages import InputError
    from workflow_scripts.core.progress import Progress
    from workflow_scripts.tiny import pretrain, world

    config, parents = job.config["scratch"], job.parents()
    prompts = {row["prompt"] for row in parents["prompts"].rows()}
    documents = world.documents(seed=config["seed"], **config["documents"])
    if seen := prompts & {row["messages"][0]["content"] for row in documents}:
        raise InputError(f"{job.out}: {len(seen)} evaluation prompts are among the pretraining documents, such as {min(seen)!r}")
    device.prepare(job.step | {"seed": config["seed"]})
    bar = Progress(config["train"]["steps"], "pretraining")
    model, tokenizer = pretrain.build(
        {key: config[key] for key in ("documents", "tokenizer", "model", "train")}, config["seed"],
        progress=lambda done, total, loss: bar.step(done, f"loss {loss:.3f}"),
    )  # fmt: skip
    bar.close()
    chat.end_of_turn(tokenizer)
    with artifacts.complete(job, "base", parents) as draft:
        model.save_pretrained(draft.folder, max_shard_size="1000GB")
        tokenizer.save_pretrained(draft.folder)
        # transformers may load a saved tokenizer as the class of the model's family, with other rules for splitting text.
        texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in documents]
        if (
            AutoTokenizer.from_pretrained(draft.folder, local_files_only=True)(texts)["input_ids"]
            != tokenizer(texts)["input_ids"]
        ):
            raise InputError(f"{job.out}: the tokenizer, saved and loaded again, gives other tokens")
        draft.manifest |= {
            "source": job.config["source"],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "end_of_turn": tokenizer.eos_token,
        }


if __name__ == "__main__":
    cli.run(main, __doc__)
