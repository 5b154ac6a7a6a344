"""A model card of a run, written from its manifests alone: nothing in it was typed by hand.

    python -m workflow_scripts.tools.card results/dpo              print it
    python -m workflow_scripts.tools.card results/dpo --out CARD.md

It says what was trained on what, with which settings, what the method's own objective was before and after, and how the run
scored, with standard errors, if its scores are of this very adapter. The licence is left to the person who publishes: it
follows from the base model's and the data's, which no manifest knows.
"""

import argparse
from pathlib import Path

from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.fingerprint import canonical
from workflow_scripts.artifacts.manifests import Artifact
from workflow_scripts.plumbing.jsonl import write_atomically
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import runs

METRICS = {
    "prompt_level_strict_acc": "prompt, strict",
    "inst_level_strict_acc": "instruction, strict",
    "prompt_level_loose_acc": "prompt, loose",
    "inst_level_loose_acc": "instruction, loose",
}
FULL = {
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimisation",
    "kto": "Kahneman-Tversky optimisation",
    "simpo": "simple preference optimisation",
    "cpo": "contrastive preference optimisation",
    "orpo": "odds ratio preference optimisation",
    "rm": "reward modelling (Bradley-Terry)",
    "ppo": "proximal policy optimisation with a value function",
    "grpo": "group relative policy optimisation",
    "rloo": "REINFORCE leave-one-out",
}


def base_of(start: Artifact) -> Artifact:
    """The base model below a merged one."""
    while start.data["kind"] == "merged":
        start = runs.parent(start, "start")
    return start


def source_of(base: Artifact) -> dict:
    """Where the base model came from, as its step says: {"source": "hub", "id": ..., "revision": ...} and the like."""
    config = base.data.get("step", {}).get("config", {})
    kind = config.get("source", "unknown")
    body = config.get(kind) if kind != "scratch" else None  # the tiny world's numbers are in the manifest
    found = {"source": kind, **(body if isinstance(body, dict) else {} if body is None else {kind: body})}
    return found | {"revision": base.data["revision"]} if "revision" in base.data else found


def hub_base(start: Artifact) -> dict | None:
    """id and revision of the hub model that an adapter of `start` fits, None where `start` is no plain hub model."""
    source = source_of(start) if start.data["kind"] == "base" else {}
    return {"id": source["id"], "revision": source.get("revision")} if source.get("source") == "hub" and "id" in source else None


def trained(run: runs.Run) -> Artifact | None:
    """The adapter whose training made this model what it is: the run's own, or the one that was fused in last."""
    if run.adapter is None and run.start.data["kind"] == "merged":
        return runs.parent(run.start, "adapter")
    return run.adapter


def scores_of(run: runs.Run) -> dict | None:
    """The run's scores, if they are of this model: the chain score -> answers -> adapter must end at the adapter at hand."""
    scores = runs.read_json(runs.scores_file(run.folder))
    responses = runs.read_json(run.folder / runs.PHASES["responses"])
    if scores is None or responses is None:
        return None
    adapter = trained(run)
    role, model = ("start", run.start) if adapter is None else ("adapter", adapter)
    try:
        whole = scores["parents"]["responses"]["fingerprint"] == responses["fingerprint"]
        ours = responses["parents"][role]["fingerprint"] == model.fingerprint
    except KeyError:
        return None
    return scores if whole and ours else None


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return canonical(value) if isinstance(value, dict) else str(value).lower() if isinstance(value, bool) else str(value)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]] + [""]


def _front(run: runs.Run) -> list[str]:
    """The metadata block that a hub reads. No licence: see the module."""
    base = source_of(base_of(run.start))
    scores = run.adapter is not None and run.adapter.data["step"]["config"]["method"] == "rm"
    task = "text-classification" if scores else "text-generation"
    lines = ["---", "library_name: " + ("peft" if run.adapter else "transformers"), f"pipeline_tag: {task}"]
    if base["source"] == "hub" and "id" in base:
        lines.append(f"base_model: {base['id']}")
    tags = ["phaseline", *([run.adapter.data["step"]["config"]["method"], "lora"] if run.adapter else [])]
    return [*lines, "tags: [" + ", ".join(tags) + "]", "---", ""]


def _data(run: runs.Run) -> list[str]:
    """The rows of every adapter in the model: those that were fused into its start count as well."""
    adapters, start = [], run.start
    while start.data["kind"] == "merged":
        adapters.append(runs.parent(start, "adapter"))
        start = runs.parent(start, "start")
    adapters = [*reversed(adapters), *([run.adapter] if run.adapter else [])]
    head = ["slice", "trained", "source", "rows asked for", "held out", "seed", "dropped", "fingerprint"]
    body = []
    for adapter in adapters:
        rows = runs.parent(adapter, "rows")
        config = rows.data.get("step", {}).get("config", {})
        sampled = config.get("source", {}).get("sampled")
        if sampled is not None:
            judged = {key: config[key] for key in ("reward", "placebo") if key in config}
            config = config | {"source": {"sampled": _asked(rows) | sampled | judged}}
        dropped = "; ".join(f"{count} {reason}" for reason, count in rows.data.get("dropped", {}).items()) or "none"
        facts = [_value(config.get(key, "?")) for key in ("source", "rows", "heldout", "seed")]
        name = rows.path.name.removesuffix(".manifest.json")
        body.append([name, f"`{adapter.folder.parent}`", *facts, dropped, f"`{rows.fingerprint}`"])
    return ["## Data", "", *_table(head, body)]


def _asked(rows: Artifact) -> dict:
    """Which run answered which prompts how, of a slice that a run made: its answers say so."""
    answers = runs.parent(rows, "answers")
    asked, model = answers.data["step"]["config"]["source"]["sampled"], answers.data["parents"]
    run = Path(model["adapter"]["path"]).parents[1] if "adapter" in model else Path(model["start"]["path"]).parent
    prompts = Path(model["prompts"]["path"]).name.removesuffix(".manifest.json")
    return {"run": str(run), "prompts": prompts, **asked}


def _objective(facts: dict) -> list[str]:
    def shown(value: float | None) -> str:
        return "no value (no prompt has both a wanted and an unwanted answer)" if value is None else f"{value:g}"

    rows = [[name, shown(before), shown(facts["after"][name])] for name, before in facts["before"].items()]
    lead = "On rows of the slice that were kept from training, in the method's own terms:"
    return ["## Did it train?", "", lead, "", *_table(["", "before", "after"], rows)]


def _scores(run: runs.Run) -> list[str]:
    scores = scores_of(run)
    if scores is None:
        return ["## Scores", "", "None of this very model yet.", ""]
    rows = []
    for metric, name in METRICS.items():
        stderr = scores.get(f"{metric}_stderr")
        n = scores["n_prompts" if metric.startswith("prompt") else "n_instructions"]
        rows.append([name, f"{100 * scores[metric]:.2f}", "n/a" if stderr is None else f"{100 * stderr:.2f}", str(n)])
    answers = manifests.read(run.folder / runs.PHASES["responses"]).data["step"]
    batch, drawn = answers["config"]["generation"].get("batch_size"), answers["config"].get("drawn")
    decoding = f"Mean of {drawn['samples']} answers at temperature {drawn['temperature']}" if drawn else "Greedy"
    how = (
        f"IFEval (Zhou et al. 2023, arXiv:2311.07911), scored by lm-eval's own checkers, prompts of slice "
        f"`{Path(scores['parents']['prompts']['path']).name.removesuffix('.manifest.json')}`. {decoding}, chat template on, "
        f"at most {answers['config']['max_new_tokens']} new tokens, {f'batch {batch}, ' if batch else ''}{answers['precision']}. "
        "Percent; the standard error covers the choice of prompts, not the training seed."
    )
    return ["## Scores", "", how, "", *_table(["", "score", "standard error", "n"], rows)]


def _lineage(run: runs.Run) -> list[str]:
    """How to get from the base to this model: the chain of starts, each with the sha256 of its weights."""
    chain, start = [], run.start
    while start.data["kind"] == "merged":
        chain.append(start)
        start = runs.parent(start, "start")
    rows = [["base", _value(source_of(start)), f"`{start.weights_sha256}`"]]
    for one in reversed(chain):
        rows.append(["merge", f"`{one.folder}`: an adapter fused into the row above", f"`{one.weights_sha256}`"])
    if run.adapter is not None:
        seed, weights = run.adapter.data["step"]["seed"], run.adapter.data["files"]["adapter_model.safetensors"]
        rows.append(["this adapter", f"trained on the row above, seed {seed}", f"`{weights}`"])
    text = ["## What it is made of", "", *_table(["", "", "sha256 of the weights"], rows)]
    if run.adapter is not None and chain:
        text += [
            "**The adapter fits the merged model above, not the plain base.** On another base it means nothing. Whoever has only "
            "this repository needs that merge first; the fused model of this run (`snakemake "
            f"{run.folder}/merged/manifest.json`) stands alone.",
            "",
        ]
    return text


def _settings(adapter: Artifact) -> list[str]:
    step, config = adapter.data["step"], adapter.data["step"]["config"]
    rows = [["method", f"{config['method']}: {FULL.get(config['method'], config['method'])}"]]
    rows += [["base while training", "full precision" if config["quantise"] == "none" else config["quantise"]]]
    rows += [[f"lora.{key}", _value(value)] for key, value in config["lora"].items()]
    rows += [[f"quant.{key}", _value(value)] for key, value in config.get("quant", {}).items()]
    rows += [[f"train.{key}", _value(value)] for key, value in sorted(config["train"].items())]
    if chosen := adapter.data.get("selection"):
        point = next(trial["point"] for trial in chosen["trials"] if trial["name"] == chosen["chosen"])
        rows += [[key, _value(value)] for key, value in point.items()]
        rows += [["chosen", f"the best of {len(chosen['trials'])} trials by {chosen['by']}: `{chosen['run']}`"]]
    rows += [["optimiser", config["optim"]]]
    rows += [[key, _value(step[key])] for key in ("seed", "precision", "device", "threads") if key in step]
    constant = adapter.data.get("constant", {})
    rows += [
        [key.replace("_", " "), _value(constant[key])] for key in ("trainable_parameters", "adapter_dtype") if key in constant
    ]
    packages = ", ".join(f"{name} {version}" for name, version in step.get("packages", {}).items())
    return ["## Settings", "", *_table(["", ""], [*rows, *([["packages", packages]] if packages else [])])]


def card(run: runs.Run, name: str = "") -> str:
    """The card of a run as Markdown. name: the heading, by default the folder's name."""
    text = [*_front(run), f"# {name or run.folder.name}", ""]
    adapter = trained(run)
    if adapter is None:
        text += ["A base model, without an adapter.", ""]
    else:
        method = FULL.get(adapter.data["step"]["config"]["method"], adapter.data["step"]["config"]["method"])
        text += [f"{'A LoRA adapter' if run.adapter else 'A model with a LoRA adapter fused in'}, trained by {method}.", ""]
    text += ["Licence: not stated here. It follows from those of the base model and of the data below; add it to publish.", ""]
    text += _scores(run)
    if adapter is not None and "objective" in adapter.data:
        text += _objective(adapter.data["objective"])
    text += _lineage(run)
    if adapter is not None:
        text += _data(run) + _settings(adapter)
    mark = (run.adapter or run.start).fingerprint
    text += ["## Fingerprint", "", f"`{mark}`: the hash of everything that decided this model (`manifest.json`, key `step`).", ""]
    return "\n".join(text + _warnings(run))


def _warnings(run: runs.Run) -> list[str]:
    text = []
    for made in (run.adapter, run.start):
        if made is not None and made.data.get("package_mismatch"):
            other = canonical(made.data["package_mismatch"])
            text += [f"**{made.folder} was made with other package versions than the locked ones**: {other}", ""]
    if base_of(run.start).data.get("pinned") is False:
        text += ["**The base model's revision was not pinned** in the config; the commit above is the one that was fetched.", ""]
    return text


def lay_beside(adapter: Path) -> None:
    """README.md in the folder of an adapter. Not part of the artifact: it changes with the card's wording."""
    write_atomically(adapter / "README.md", card(runs.open_run(adapter.parent)).encode("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run, such as results/dpo")
    parser.add_argument("--out", type=Path, help="write the card to this file instead of printing it")
    args = parser.parse_args()
    run = runs.open_run(args.run)
    if args.out is not None and args.out.resolve() in [path.resolve() for path in args.run.rglob("*manifest.json")]:
        raise InputError(f"{args.out}: is a manifest of the run and would be overwritten; give --out another name")
    text = card(run)
    if args.out is None:
        print(text)
    else:
        write_atomically(args.out, text.encode("utf-8"))


if __name__ == "__main__":
    runs.command(main)
