"""Fuse an adapter into the model that it was trained on: W + (alpha/r) B A, in fp32.

The merged model is what every experiment that starts from this one trains on and is evaluated on, and a model of its own: with
the ending `_merged` it is answered and scored. W lies on the grid of the base's dtype, and a sum that is rounded to that grid may
be W again, so it is kept in that dtype only where 99 % of the update survive (by projection), else in fp32; the manifest says
what each keeps, and which share of the weights it leaves unchanged. The weights are a cache: they can be deleted, and are rebuilt
from base and adapter when something needs them.

An adapter that was trained on a 4-bit base is fused into the full-precision one, so the merged model is not exactly the one
that was trained. The manifest says by how much: the largest and mean absolute difference, and the agreement of the greedy
next token, between the merged model's logits and (a) full-precision base + adapter, (b) NF4 base + adapter, on a fixed text.
"""

from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli

PROBE = "write about the sea. use no commas. answer in lower case and stop after a few words."


def main(job: manifests.Job) -> None:
    import torch

    from workflow_scripts.models import chat, device, loading, lora

    parents = job.parents()
    start, adapter = parents["start"], parents["adapter"]
    device.prepare(job.step | {"device": "cpu"}, job.deterministic)
    tokenizer = chat.tokenizer_of(start)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}], tokenize=False
    )
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(tokens).logits.float()

    with manifests.complete(job, "merged", parents) as draft:
        others = {}

        def look(model) -> None:
            others["full_precision"] = logits(model)

        facts = loading.save_merged(start, adapter, job.work, "cpu", draft.folder, before=look)
        from transformers import AutoModelForCausalLM

        merged = logits(AutoModelForCausalLM.from_pretrained(draft.folder, dtype=torch.float32, local_files_only=True))
        others["nf4"] = logits(lora.attach(loading.load(start, job.work, "cpu", "fp32", job.config["quant"]), start, adapter))
        distance = {}
        for name, other in others.items():
            gap = (merged - other).abs()
            distance[f"logits_from_{name}_base_and_adapter"] = {
                "max_abs": round(gap.max().item(), 5),
                "mean_abs": round(gap.mean().item(), 5),
                "same_next_token": round((merged.argmax(-1) == other.argmax(-1)).float().mean().item(), 5),
            }
        draft.manifest |= facts | distance | {"probe_tokens": tokens.shape[1], "trained_quantised": job.config["quantise"]}


if __name__ == "__main__":
    cli.run(main, __doc__)
