"""Measures the backends of generation/ on the same prompts, in one run: tokens a second, memory, and the time from a cold start.

    python -m measurements.generation --out generation.json                     # Qwen2.5-0.5B's shape, random weights, on a GPU
    python -m measurements.generation --out generation.json --shape tiny --parts equal fixed prefix    # a trial on a CPU

Random weights know no end of turn: lengths are set. What docs/generation.md says is kept in
generation_h200.json, and tests/docs/test_generation.py compares the two.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from measurements import few_shot
from workflow_scripts.generation.answers import ROWS, Answer, Asked, rows_for
from workflow_scripts.generation.graphs import Graphs

SHAPES = {  # of Qwen2; 135m has the sizes of SmolLM2-135M, and biases that this has not
    "0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
                 vocab_size=151936, tie_word_embeddings=True),
    "135m": dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
                 vocab_size=49152, tie_word_embeddings=True),
    "7b": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
               vocab_size=152064, tie_word_embeddings=False),
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
                 vocab_size=512, tie_word_embeddings=True),
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BANDWIDTH = 4.27e12  # bytes a second: a copy on the H200 that was measured


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def model_of(shape: str, device: str, dtype: torch.dtype, adapter: bool) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model: Any = Qwen2ForCausalLM(Qwen2Config(**SHAPES[shape], max_position_embeddings=4096, rope_theta=1e6)).eval()
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return beside(model) if adapter else model


def beside(model: Any) -> Any:
    """The model with an adapter of the study's block, of random weights, beside its own."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)).eval()
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1e-3)
    return peft.get_base_model()


def fixed(size: int, vocabulary: int) -> tuple[list[list[int]], list[int]]:
    draw = random.Random(3)
    prompts = [[draw.randrange(3, vocabulary) for _ in range(draw.randint(32, 96))] for _ in range(size)]
    return prompts, [size] * len(prompts)


def mixed(vocabulary: int, count: int = 541) -> tuple[list[list[int]], list[int]]:
    """Prompts of 30 to 400 tokens; answers of 20 to 1,280, mean 450."""
    draw = random.Random(4)
    prompts = [[draw.randrange(3, vocabulary) for _ in range(draw.randint(30, 400))] for _ in range(count)]
    return prompts, [20 + round(1260 * draw.betavariate(1.1, 2.13)) for _ in range(count)]


class Measured(Graphs):
    """The product's engine, with a length for each answer."""

    lengths: list[int]
    filled = 0  # rows that went through the model to fill slots

    def _fill(self, entering: Any, asked: Asked) -> None:
        super()._fill(entering, asked)
        for slot, place, *_ in entering:
            self.state.limit[slot] = self.lengths[place]

    def _through(self, rows: Any) -> Any:
        self.filled += len(rows)
        return super()._through(rows)


def graphs(model: Any, work: tuple[list[list[int]], list[int]], runs: int, exact: bool = False,
           kept: dict[int, list[int]] | None = None, **how: Any) -> dict:  # fmt: skip
    """kept: takes the answers to each prompt."""
    prompts, lengths = work
    torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
    began = time.perf_counter()
    engine = Measured(model, ROWS, max(map(len, prompts)) + max(lengths), exact=exact)
    engine.lengths = [2] * len(prompts)
    asked = Asked((-1,), max(lengths), **how)
    engine.answer(list(enumerate(prompts)), asked, lambda *_: None)
    sync()
    ready = time.perf_counter() - began
    engine.lengths, engine.filled, times = lengths, 0, []
    for _ in range(runs):
        made = [0]

        def done(place: int, sample: int, answer: Answer, made: list[int] = made) -> None:
            made[0] += len(answer.tokens)
            if kept is not None:
                kept[place] = answer.tokens

        sync()
        start = time.perf_counter()
        engine.answer(list(enumerate(prompts)), asked, done)
        sync()
        times.append(time.perf_counter() - start)
    assert made[0] == sum(lengths) * asked.samples
    found = {"tokens": made[0], "seconds": [round(t, 3) for t in times], "tokens_per_second": round(made[0] / min(times)),
             "ready_s": round(ready, 1), "prompt_tokens": sum(map(len, prompts)), "filled": engine.filled // runs}  # fmt: skip
    if torch.cuda.is_available():
        cache = sum(kept.nbytes for kept in engine.cache)
        weights = sum(p.nbytes for p in model.parameters())
        found |= {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "cache_gib": round(cache / 2**30, 2),
                  "weights_gib": round(weights / 2**30, 2)}  # fmt: skip
    return found


def padded(rows: list[list[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of prompts for `generate`, padded on the left."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def hf(model: Any, work: tuple[list[list[int]], list[int]], batch: int) -> dict:
    """`generate`, prompts in batches from the longest on; a batch goes on until its longest answer ends."""
    prompts, lengths = work
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    sync()
    start = time.perf_counter()
    for first in range(0, len(order), batch):
        rows = [prompts[i] for i in order[first : first + batch]]
        new = max(lengths[i] for i in order[first : first + batch])
        ids, mask = padded(rows, model.device)
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )
    sync()
    took = time.perf_counter() - start
    return {"tokens": sum(lengths), "seconds": [round(took, 3)], "tokens_per_second": round(sum(lengths) / took)}


def equal(shape: str, device: str, count: int, new: int) -> dict:
    """In fp32, with an adapter: answers of `graphs` against those of `generate`, prompt by prompt."""
    model = model_of(shape, device, torch.float32, True)
    prompts, _ = mixed(SHAPES[shape]["vocab_size"], count)
    theirs = []
    for first in range(0, count, 64):
        rows = prompts[first : first + 64]
        ids, mask = padded(rows, device)
        with torch.inference_mode():
            made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                                  pad_token_id=0)  # fmt: skip
        theirs += made[:, ids.shape[1] :].tolist()
    engine = Graphs(model, 256, 400 + new)
    found: dict[int, dict[int, list[int]]] = {}
    for n, part in enumerate((list(enumerate(prompts)), list(enumerate(prompts))[::3])):
        found[n] = {}
        engine.answer(part, Asked((-1,), new), lambda place, _, answer, n=n: found[n].__setitem__(place, answer.tokens))
    same = sum(found[0][i] == one for i, one in enumerate(theirs))
    alone = sum(found[0][i] == one for i, one in found[1].items())
    return {"prompts": count, "new": new, "equal": same, "equal_with_a_third_of_the_prompts": [alone, len(found[1])]}


def rollouts(shape: str) -> dict:
    """Answers of 512 tokens that a training in NF4 draws: PPO's 64 to as many prompts, GRPO's 32 to 8."""
    import tempfile

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quant = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    with tempfile.TemporaryDirectory() as folder:
        model_of(shape, "cuda", torch.bfloat16, False).save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quant, dtype=torch.bfloat16, device_map={"": 0})
    model = get_peft_model(loaded, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)).get_base_model()
    prompts, _ = mixed(SHAPES[shape]["vocab_size"], 64)
    found = {}
    for name, asked_for, answers in (("ppo", prompts, 64), ("grpo", [p for p in prompts[:8] for _ in range(4)], 32)):
        torch.cuda.reset_peak_memory_stats()
        engine, times = Graphs(model, answers, 400 + 512, rows=rows_for(answers)), []
        for n in range(4):
            sync()
            start = time.perf_counter()
            engine.load()
            engine.answer([*enumerate(asked_for)], Asked((-1,), 512, temperature=1.0, seed=n, logprobs=True), lambda *_: None)
            sync()
            times.append(time.perf_counter() - start)
        found[name] = {"answers": answers, "first_s": round(times[0], 2), "seconds": [round(t, 3) for t in times[1:]],
                       "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}  # fmt: skip
        del engine
    return found


def of_a_model(folder: Path, adapter: Path | None, file: Path, new: int) -> dict:
    """Real weights and prompts, an adapter (without one, one of random weights): answers of `graphs` against those of `generate`,
    in fp32 and in bf16. Where two differ, the gap between the two tokens' logits there, in steps of bf16 at that logit."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    asked = [{"role": "user", "content": row["prompt"]} for row in rows]
    ids = [tokenizer.apply_chat_template([turn], add_generation_prompt=True)["input_ids"] for turn in asked]
    end, found = tokenizer.eos_token_id, {"prompts": len(ids), "new": new}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to("cuda").eval()
        model = beside(model) if adapter is None else PeftModel.from_pretrained(model, adapter).eval().get_base_model()
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        theirs: dict[int, list[int]] = {}
        sync()
        start = time.perf_counter()
        for first in range(0, len(order), 541):
            part = order[first : first + 541]
            batch, mask = padded([ids[i] for i in part], "cuda")
            with torch.inference_mode():
                made = model.generate(input_ids=batch, attention_mask=mask, max_new_tokens=new, do_sample=False,
                                      eos_token_id=[end], pad_token_id=tokenizer.pad_token_id)  # fmt: skip
            made = made[:, batch.shape[1] :].tolist()
            for i, row in zip(part, made, strict=True):
                theirs[i] = row[: row.index(end) + 1] if end in row else row
        sync()
        took = {"generate": round(time.perf_counter() - start, 1)}
        for exact in (False, True):
            if exact and name == "fp32":
                continue
            model2 = model
            start = time.perf_counter()
            engine = Graphs(model2, ROWS, max(map(len, ids)) + new, exact=exact)
            ours: dict[int, list[int]] = {}
            engine.answer([*enumerate(ids)], Asked((end,), new), lambda i, _, made, ours=ours: ours.__setitem__(i, made.tokens))
            sync()
            took["graphs"] = round(time.perf_counter() - start, 1)
            again: dict[int, list[int]] = {}
            start = time.perf_counter()
            fewer = [(i, one) for i, one in enumerate(ids)][::-3]
            engine.answer(fewer, Asked((end,), new), lambda i, _, made, again=again: again.__setitem__(i, made.tokens))
            few = Graphs(model2, 100, max(map(len, ids)) + new, exact=exact)
            in_fewer_slots: dict[int, list[int]] = {}
            few.answer(fewer, Asked((end,), new), lambda i, _, made, s=in_fewer_slots: s.__setitem__(i, made.tokens))
            gaps = []
            for i, theirs_i in theirs.items():
                place = next((n for n, (a, b) in enumerate(zip(ours[i], theirs_i, strict=False)) if a != b), None)
                if place is None:
                    if len(ours[i]) != len(theirs_i):
                        gaps.append(float("inf"))
                    continue
                with torch.no_grad():
                    logits = model(torch.tensor([ids[i] + ours[i][:place]], device="cuda")).logits[0, -1].float()
                a, b = logits[ours[i][place]], logits[theirs_i[place]]
                gaps.append(((a - b).abs() / (2.0 ** (torch.log2(a.abs().clamp(min=1e-6)).floor() - 7))).item())
            gaps.sort()
            found[f"{name}{' exact' if exact else ''}"] = {
                "tokens": sum(map(len, ours.values())), "seconds": dict(took), "equal": len(ids) - len(gaps),
                "gap_in_bf16_steps": {"median": gaps[len(gaps) // 2] if gaps else 0, "largest": gaps[-3:]},
                "alone_equal": [sum(ours[i] == one for i, one in again.items()), len(again)],
                "in_100_slots_equal": [sum(ours[i] == one for i, one in in_fewer_slots.items()), len(in_fewer_slots)],
            }  # fmt: skip
            del engine, few
        del model
        torch.cuda.empty_cache()
    return found


def profile(model: Any, work: tuple[list[list[int]], list[int]], deep: int) -> dict:
    """One decode step by kernel, in microseconds, with the time that its bytes need at the card's bandwidth."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    prompts, lengths = work
    engine = Measured(model, ROWS, max(map(len, prompts)) + max(lengths))
    engine.lengths = lengths
    asked = Asked((-1,), max(lengths))
    engine._prepare(asked)
    entering = [(slot, slot, prompts[slot], 0) for slot in range(min(ROWS, len(prompts)))]
    engine._fill(entering, asked)
    engine._step(ROWS, asked)
    for _ in range(deep):
        engine._step(ROWS, asked)
    sync()
    start = time.perf_counter()
    for _ in range(50):
        engine._step(ROWS, asked)
    sync()
    step = (time.perf_counter() - start) / 50
    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        engine._step(ROWS, asked)
        sync()
    rows = sorted(((e.self_device_time_total, e.count, e.key[:90]) for e in seen.key_averages()), reverse=True)
    at = int(engine.state.at.sum())
    moved = sum(p.nbytes for p in {p.data_ptr(): p for p in model.parameters()}.values())
    moved += at * 2 * len(engine.decoder.layers) * engine.decoder.kv_heads * engine.decoder.size * engine.cache[0].element_size()
    return {"mean_position": at // ROWS, "step_us": round(step * 1e6), "kernels_us": round(sum(r[0] for r in rows)),
            "kernels": sum(r[1] for r in rows), "bound_us": round(moved / BANDWIDTH * 1e6),
            "largest": [[round(t), n, name] for t, n, name in rows[:16]]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="0.5b", choices=[*SHAPES])
    parser.add_argument("--parts", nargs="+", default=["fixed", "mixed", "sampled", "hf", "equal", "profile", "rollouts"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["plain", "adapter", "adapter in fp32"])
    parser.add_argument("--model", type=Path, help="a base's folder, for the part `model`")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--prompts", type=Path, help="a slice of prompts")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    vocabulary = SHAPES[given.shape]["vocab_size"]
    size = 256 if given.shape != "tiny" else 16
    made: dict[str, Any] = {"shape": given.shape, "torch": torch.__version__,
                            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}  # fmt: skip

    def note(name: str, run: Any) -> None:
        start = time.perf_counter()
        torch._dynamo.reset()  # parts are other engines of one process; it compiles a function for so many kinds alone
        try:
            made[name] = run()
        except Exception as error:  # the other parts are measured all the same
            import traceback

            traceback.print_exc()
            made[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(f"{time.perf_counter() - start:.1f} s", name, json.dumps(made[name]), flush=True)
        given.out.write_text(json.dumps(made, indent=1) + "\n")
        if device == "cuda":
            torch.cuda.empty_cache()

    for kind in ("plain", "adapter", "adapter in fp32"):
        if kind not in given.kinds:
            continue
        parts = [part for part in ("fixed", "mixed", "sampled") if part in given.parts]
        if not parts and "prefix" not in given.parts:
            continue
        model = model_of(given.shape, device, dtype, kind != "plain")
        for part in parts:
            work = mixed(vocabulary, 541 if size > 16 else 20) if part == "mixed" else fixed(size, vocabulary)
            how = {"temperature": 1.0, "logprobs": True} if part == "sampled" else {}
            if part != "sampled" or kind == "adapter":
                exact = kind == "adapter in fp32"
                note(f"{part}, {kind}", lambda w=work, h=how, m=model, e=exact: graphs(m, w, given.runs, e, **h))
        if "prefix" in given.parts and kind != "adapter in fp32":
            work = few_shot.work(vocabulary, small=device == "cpu")
            note(f"prefix, {kind}", lambda w=work, m=model: few_shot.prefix(graphs, m, w, given.runs))
        if kind == "adapter" and "profile" in given.parts:
            note("profile", lambda m=model: profile(m, fixed(size, vocabulary), 16))
            note("profile, deep", lambda m=model: profile(m, (mixed(vocabulary)[0], [1280] * 541), 600))
        del model
    if "hf" in given.parts:
        for kind in ("plain", "adapter"):
            model = model_of(given.shape, device, dtype, kind == "adapter")
            note(f"fixed, hf, {kind}", lambda m=model: hf(m, fixed(size, vocabulary), size))
            del model
    if "hf mixed" in given.parts:
        model = model_of(given.shape, device, dtype, True)
        note("mixed, hf, adapter", lambda: hf(model, mixed(vocabulary), 541))
    if "rollouts" in given.parts:
        note("rollouts", lambda: rollouts(given.shape))
    if "model" in given.parts:
        for new in (128, 1280):
            note(f"model, {new}", lambda n=new: of_a_model(given.model, given.adapter, given.prompts, n))
    if "equal" in given.parts:
        note("equal", lambda: equal(given.shape, device, 192 if size > 16 else 20, 128 if size > 16 else 16))


if __name__ == "__main__":
    main()
