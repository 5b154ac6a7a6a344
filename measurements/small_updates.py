"""What a merge in bf16 rounds away, and what is judged in its place: a DPO, an SFT and a KTO adapter on SmolLM2-135M-Instruct.

    PYTHONPATH=. python measurements/small_updates.py --work small_updates

Needs the GGUF file that `make smollm2` leaves in models/. Half an hour on half a core of an AMD EPYC; `--work` keeps what was
made, so that a stopped run goes on. The project's own steps, in fp32, one thread, on a base in bf16, so that the weights lie on
its grid; every adapter starts from that base. Short rows and prompts alone, so that a core can do it: scores are small samples.

DPO takes so many steps at such a rate that the rates sum up to 8.5e-4: the study's 313 steps, which peak at 5e-6, come to 7.8e-4.
Printed: how much of each adapter a merge keeps; the held-out margin of DPO through the paths of training and of evaluation and
through a merge in bf16, and the same with a quarter of its B; what distance.check says of such a merge; scores and equal answers
of the views; how far NF4 is from the full base.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

DPO = {"max_steps": 17, "learning_rate": 5e-5, "gradient_accumulation_steps": 1}
SFT = {"max_steps": 12, "learning_rate": 2e-4, "gradient_accumulation_steps": 2}
KTO = {"max_steps": 8, "learning_rate": 5e-5, "gradient_accumulation_steps": 1}
SMALL = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_checkpointing": False,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
}
TOKENS = {"sft": 112, "dpo": 72, "kto": 72}  # of a row
ROWS = {"sft": ("sft", 48, 4), "dpo": ("pairs", 34, 24), "kto": ("pairs", 8, 4)}  # of a slice: to train on, held out
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 48, 80, 48
MACHINE = {"device": "cpu", "precision": "fp32", "threads": 1}


def configured():
    from workflow_scripts.config.config import Config, load
    from workflow_scripts.config.written import merge

    methods = {
        name: {"train": SMALL | {"max_length": TOKENS[name]} | more} for name, more in (("dpo", DPO), ("sft", SFT), ("kto", KTO))
    }
    return Config(merge(load("config/smollm2.yaml").data, MACHINE | {"methods": methods}))


class World:
    """The folder of a run: each artifact is made once."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, configured()

    def run(self, step: str, out: str, parents: dict[str, Path], config: dict, inputs: tuple[Path, ...] = (), **more) -> Path:
        from tests.support import small_steps

        path = self.folder / out
        if not path.exists():
            job = small_steps.job(step, path, parents, config)
            job.step |= MACHINE | more
            job.inputs += inputs
            started = time.monotonic()
            small_steps.run(job)
            (self.folder / "seconds.jsonl").open("a").write(json.dumps({out: round(time.monotonic() - started)}) + "\n")
        return path

    def base(self) -> Path:
        body = self.config.data["base"]
        from workflow_scripts.config import bases

        file = Path(body["gguf"]["file"])
        settings = {"source": "gguf", "gguf": body["gguf"] | {"file": file.name}, "dtype": "bf16"}
        settings |= {"end_of_turn": body["end_of_turn"], "training_template": bases.training_template(self.config, "base")}
        return self.run("make_base", "base/manifest.json", {}, settings, (file,))

    def slice(self, name: str, parents: dict[str, Path]) -> Path:
        """As the config says, without its limit to what is dropped."""
        data = self.config.data["data"]
        body = data["slices"][name]
        files = [Path(one) for one in body["source"].get("paths", [body["source"].get("path")])]
        settings = body | {"source": {"files": [one.name for one in files]}}
        if parents:
            settings |= {"max_drop": 1.0, "max_prompt_tokens": 112, "decontaminate": data["decontaminate"]}
        from workflow_scripts.data import slicing

        picked = slicing.candidates([str(one) for one in files], body["rows"], body["seed"], body["kind"], body.get("group_by"))
        more = {"external": {"candidate_rows": slicing.rows_hash(picked)}}
        return self.run("slice_data", f"all/{name}.manifest.json", parents, settings, tuple(files), **more)

    def short(self, base: Path) -> dict[str, Path]:
        """Slices of short rows: those of the config's slices in their order that are no longer than TOKENS, a prompt once."""
        from tests.support import small_steps
        from workflow_scripts.artifacts import manifests
        from workflow_scripts.data import fitting, slicing
        from workflow_scripts.models import chat

        tokenizer = chat.tokenizer_of(manifests.read(base))
        prompts = self.slice("ifeval", {})
        made = {"ifeval": self.folder / "data/ifeval.manifest.json"}
        if not made["ifeval"].exists():
            rows = [
                row
                for row in manifests.read(prompts).rows()
                if len(tokenizer.apply_chat_template(slicing.prompt_turns(row))["input_ids"]) <= PROMPT_TOKENS
            ]
            small_steps.write_slice(self.folder / "data", "ifeval", rows[:PROMPTS], heldout=0)
        for name, (source, train, heldout) in ROWS.items():
            made[name] = self.folder / f"data/{name}.manifest.json"
            if made[name].exists():
                continue
            whole = manifests.read(self.slice(source, {"base": base, "ifeval_prompts": prompts}))
            rows, seen = [], set()  # one of a prompt, so that any of them can be held out
            for row in whole.rows():
                prompt = slicing.prompt_of(row)
                if prompt not in seen and fitting.tokens(tokenizer, row) <= TOKENS[name]:
                    rows.append(row)
                    seen.add(prompt)
                if len(rows) == train + heldout:
                    break
            print(f"{name}: {len(rows)} rows, {heldout} of them held out", flush=True)
            small_steps.write_slice(self.folder / "data", name, rows, heldout)
        return made

    def train(self, name: str, base: Path, rows: Path) -> Path:
        body = self.config.experiments[name]
        settings = {key: value for key, value in body.items() if key not in ("start_from", "slice")}
        settings |= {"lora": self.config.data["lora"], "optim": "adamw_torch"}
        settings |= {"quant": self.config.data["quant"]} if body["quantise"] != "none" else {}
        return self.run(
            f"train_{body['method']}", f"{name}/adapter/manifest.json", {"start": base, "rows": rows}, settings, seed=1
        )

    def answers(self, name: str, start: Path, adapter: Path | None, prompts: Path, nf4: bool) -> Path:
        settings = {"max_new_tokens": NEW_TOKENS, "decoding": "greedy", "generation": {"backend": "graphs", "adapter": "match"}}
        settings |= {"quant": self.config.data["quant"]} if nf4 else {}
        parents = {"start": start, "prompts": prompts} | ({"adapter": adapter} if adapter else {})
        return self.run("generate", f"{name}/ifeval_responses.manifest.json", parents, settings)


def log_probs(model, tokenizer, rows: list[dict]) -> list[tuple[float, float]]:
    """log p(answer | prompt) of the better and the worse answer of each pair, each by itself, without padding."""
    import torch

    found = []
    for row in rows:
        opening = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        pair = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"]])
            with torch.no_grad():
                logits = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - opening + 1).logits[0, :-1].float()
            pair.append(logits.log_softmax(-1).gather(-1, ids[0, opening:, None]).sum().item())
        found.append(tuple(pair))
    return found


def margins(policy: list[tuple[float, float]], reference: list[tuple[float, float]], beta: float) -> list[float]:
    return [beta * ((a - c) - (b - d)) for (a, b), (c, d) in zip(policy, reference, strict=True)]


def summed_up(each: list[float], beside: list[float]) -> dict[str, float]:
    """Mean over the pairs with standard error; `slope`: of these margins on those of the same pairs in `beside`, through 0."""
    from statistics import fmean, stdev

    slope = sum(a * b for a, b in zip(each, beside, strict=True)) / sum(b * b for b in beside)
    found = {"mean": fmean(each), "stderr": stdev(each) / len(each) ** 0.5, "size": fmean(map(abs, each)), "slope": slope}
    return {name: round(value, 6) for name, value in found.items()}


def next_tokens(model, rows: list[list[int]]) -> list:
    import torch

    with torch.no_grad():
        return [model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1) for ids in rows]


def divergence(found: list, wanted: list) -> dict[str, float]:
    """KL(found || wanted) of the next token, nats a place, and the share of places with the same most likely one."""
    places = sum(len(one) for one in found)
    kl = sum((p.exp() * (p - q)).sum().item() for p, q in zip(found, wanted, strict=True))
    same = sum((p.argmax(-1) == q.argmax(-1)).sum().item() for p, q in zip(found, wanted, strict=True))
    return {"kl": float(f"{kl / places:.4g}"), "same": round(same / places, 4), "places": places}


def rounded(model):
    """The adapter of a peft model put into its weights, the sum rounded to bf16; in place."""
    import torch
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = module.base_layer.weight.data
            weight.copy_((weight + module.get_delta_weight("default")).to(torch.bfloat16).float())
            module.lora_B["default"].weight.data.zero_()
    return model


def weakened(start, adapter, folder: Path, factor: float):
    """The adapter with its B times `factor`, as an artifact that says what it does."""
    from safetensors.torch import load_file, save_file

    from workflow_scripts.artifacts import manifests
    from workflow_scripts.artifacts.fingerprint import file_sha256
    from workflow_scripts.models import distance, loading, lora

    path = folder / "manifest.json"
    if not path.exists():
        shutil.copytree(adapter.folder, folder)
        weights = load_file(adapter.file("adapter_model.safetensors"))
        save_file(
            {name: factor * one if "lora_B" in name else one for name, one in weights.items()},
            folder / "adapter_model.safetensors",
        )
        hashes = {name: file_sha256(folder / name) for name in adapter.data["files"]}
        path.write_text(manifests.dump(adapter.data | {"files": hashes}))
        made = manifests.read(path)
        model = lora.attach(loading.load(start, folder, "cpu", "fp32"), start, made).eval()
        tokens = adapter.data["distance"]["tokens"]
        does = {"norm": distance.norms(model)} | distance.measure(distance.Peft(model), tokens) | {"tokens": tokens}
        path.write_text(manifests.dump(made.data | {"distance": does}))
    return manifests.read(path)


def of_dpo(world: World, base: Path, rows: Path) -> list[dict]:
    """The held-out margin of the whole adapter and of a quarter of it, through each path; what a merge in bf16 keeps of them."""
    import torch

    from workflow_scripts.artifacts import manifests
    from workflow_scripts.models import chat, distance, loading, lora
    from workflow_scripts.plumbing.messages import InputError

    start, trained = manifests.read(base), manifests.read(world.train("dpo", base, rows))
    tokenizer, beta = chat.tokenizer_of(start), world.config.experiments["dpo"]["train"]["beta"]
    pairs = manifests.read(rows).rows(heldout=True)
    plain = loading.load(start, world.folder, "cpu", "fp32").eval()
    reference, tokens = log_probs(plain, tokenizer, pairs), trained.data["distance"]["tokens"]
    before = next_tokens(plain, tokens)
    found = []
    for factor in (1.0, 0.25):
        adapter = trained if factor == 1.0 else weakened(start, trained, world.folder / "quarter", factor)
        one: dict = {"update": factor, "trained": {k: v for k, v in adapter.data["distance"].items() if k != "tokens"}}
        if factor == 1.0:
            one["margin in training"] = adapter.data["objective"]["after"]["margin"]
        model, beside = loading.evaluated(start, adapter, world.folder, "cpu", "fp32")
        one["check"] = loading.check(distance.Peft(beside), adapter, "fp32", None)
        evaluated = margins(log_probs(model, tokenizer, pairs), reference, beta)
        one["margin in evaluation"] = summed_up(evaluated, evaluated)
        with_adapter = lora.attach(loading.load(start, world.folder, "cpu", "fp32"), start, adapter).eval()
        one["merge in bf16"] = distance.survives(with_adapter, torch.bfloat16)
        one["merge in fp32"] = distance.survives(with_adapter, torch.float32)
        merged = rounded(with_adapter)
        one["margin of the merge"] = summed_up(margins(log_probs(merged, tokenizer, pairs), reference, beta), evaluated)
        one["kl of the merge"] = divergence(next_tokens(merged, tokens), before)["kl"]
        try:
            distance.check(distance.Peft(merged), adapter, alike=True)
            one["check of the merge"] = "passes"
        except InputError as error:
            one["check of the merge"] = str(error)
        print(json.dumps(one), flush=True)
        found.append(one)
    return found


def scored(prompts: Path, answers: Path) -> dict:
    from workflow_scripts.artifacts import manifests
    from workflow_scripts.evaluation import ifeval

    made = manifests.read(answers)
    scores = ifeval.score(manifests.read(prompts).rows(), made.rows(), False)
    names = ("prompt_level_strict_acc", "prompt_level_strict_acc_stderr", "inst_level_strict_acc", "mean_response_tokens")
    return {name: round(scores[name], 4) for name in names} | {"check": made.data.get("distance", {})}


def equal(one: Path, other: Path) -> str:
    from workflow_scripts.artifacts import manifests

    pairs = list(zip(manifests.read(one).rows(), manifests.read(other).rows(), strict=True))
    return f"{sum(a['response'] == b['response'] for a, b in pairs)} of {len(pairs)}"


def of_views(world: World, base: Path, slices: dict[str, Path], names: list[str]) -> dict:
    """Scores and answers of each adapter on the NF4 base, on the full one, and of a merge; what is trained before, here."""
    import torch

    from workflow_scripts.artifacts import manifests
    from workflow_scripts.models import distance, loading, lora

    found: dict = {}
    start = manifests.read(base)
    for name in names:
        adapter = world.train(name, base, slices[world.config.experiments[name]["method"]])
        trained = manifests.read(adapter)
        facts: dict = {"objective": {k: v for k, v in trained.data["objective"].items() if k != "change"}}
        facts["trained"] = {key: value for key, value in trained.data["distance"].items() if key != "tokens"}
        with_adapter = lora.attach(loading.load(start, world.folder, "cpu", "fp32"), start, trained)
        facts["merge in bf16"] = distance.survives(with_adapter, torch.bfloat16)
        del with_adapter
        paths = {}
        for view in ("full", "nf4"):
            paths[view] = world.answers(f"{name}_{view}", base, adapter, slices["ifeval"], view == "nf4")
            facts[view] = scored(slices["ifeval"], paths[view])
            ratio = facts[view]["check"]["kl"] / trained.data["distance"]["kl"]
            facts[view]["kl, of the trained one"] = round(ratio, 3)
        if name == "sft_v2":
            quant = {"quantise": "nf4", "quant": world.config.data["quant"]}
            merged = world.run("merge", "sft_v2/merged/manifest.json", {"start": base, "adapter": adapter}, quant)
            said = manifests.read(merged).data
            facts["merge"] = {key: said[key] for key in ("dtype", "update", *(one for one in said if one.startswith("logits")))}
            paths["merged"] = world.answers("sft_v2_merged", merged, None, slices["ifeval"], False)
            facts["merged"] = scored(slices["ifeval"], paths["merged"])
        facts["equal"] = {f"{a}, {b}": equal(paths[a], paths[b]) for a in paths for b in paths if a < b}
        found[name] = facts
        print(json.dumps({name: facts}), flush=True)
    return found


def of_places(world: World, base: Path, slices: dict[str, Path]) -> dict:
    """How far each adapter is from its start on the full base and on NF4, and NF4 from the full base, at all places of held-out
    rows and at those of the last answer alone: what stands before an answer, the models were never asked to write."""
    from workflow_scripts.artifacts import manifests
    from workflow_scripts.data import slicing
    from workflow_scripts.models import chat, loading, lora

    start = manifests.read(base)
    tokenizer, rows, openings = chat.tokenizer_of(start), [], []
    for name, count in (("sft", 4), ("dpo", 8)):
        for row in manifests.read(slices[name]).rows(heldout=True)[:count]:
            turns = next(iter(slicing.conversations(row)))
            rows.append(tokenizer.apply_chat_template(turns)["input_ids"])
            openings.append(len(tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]))

    def both(found: list, wanted: list) -> dict:
        answers = ([one[first - 1 : -1] for one, first in zip(some, openings, strict=True)] for some in (found, wanted))
        return {"all": divergence(found, wanted), "answers": divergence(*answers)}

    starts, far = {}, {}
    for view, quant in (("full", None), ("nf4", world.config.data["quant"])):
        starts[view] = next_tokens(loading.load(start, world.folder, "cpu", "fp32", quant).eval(), rows)
        for name in ("sft_v2", "kto", "dpo"):
            adapter = manifests.read(world.folder / name / "adapter/manifest.json")
            model = lora.attach(loading.load(start, world.folder, "cpu", "fp32", quant), start, adapter).eval()
            far[f"{name} on {view}"] = both(next_tokens(model, rows), starts[view])
    return {"nf4 from full": both(starts["nf4"], starts["full"])} | far


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, required=True, help="a folder for what is made on the way")
    work = made.parse_args().work
    import torch

    torch.set_num_threads(1)
    world = World(work)
    base = world.base()
    slices = world.short(base)
    found: dict = {"dpo": of_dpo(world, base, slices["dpo"])}
    found["views"] = of_views(world, base, slices, ["sft_v2", "kto", "dpo"])
    found["places"] = of_places(world, base, slices)
    print(json.dumps(found["places"]), flush=True)
    (work / "found.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
