"""Base models from elsewhere: a local folder, a GGUF file, a hub. Made into a base, trained on, refused where they must be."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.fingerprint import ROOT, file_sha256
from workflow_scripts.config import bases, config, yaml_files
from workflow_scripts.config.written import merge
from workflow_scripts.data import slicing
from workflow_scripts.models import chat, sources
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError

STORIES = ROOT / "tests/files/tinystories-656k"  # a trained Llama of 656,000 weights: context 512, no chat template
GGUF = ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
END = "<|end_story|>"


def user_config(tmp_path: Path, **base) -> dict:
    """The default config over another base model."""
    made = merge(yaml_files.read_yaml(ROOT / "config/config.yaml"), {"pathvars": {"results": str(tmp_path / "results")}})
    made["base"] = {"dtype": "fp32", "training_template": "chatml_text", **base}
    return made


def plan(tmp_path: Path, **base) -> Plan:
    return Plan(config.Config(user_config(tmp_path, **base)))


def make(tmp_path: Path, planned: Plan, *inputs: Path) -> manifests.Artifact:
    """Run make_base as planned."""
    files = list(inputs) or [Path(file) for file in bases.files(planned.config.models["base"])]
    out = tmp_path / "base/manifest.json"
    return small_steps.run(manifests.Job(copy.deepcopy(planned.step("base", "base")), files, out, tmp_path / ".work"))


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    return make(folder, plan(folder, source="path", path=str(STORIES)))


def pair(question: str, good: str = "A cat was happy.", bad: str = "No.") -> dict:
    one = [{"role": role, "content": text} for role, text in (("user", question), ("assistant", good), ("assistant", bad))]
    return {"prompt": one[:1], "chosen": one[1:2], "rejected": one[2:]}


def talk(question: str, answer: str = "A cat was happy.") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# -- a local folder ----------------------------------------------------------------------------------------------------


def test_a_local_folder_becomes_a_base_with_the_same_model(stories):
    import torch
    from transformers import AutoModelForCausalLM

    assert set(stories.data["files"]) == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    facts = {key: stories.data[key] for key in ("parameters", "dtype", "end_of_turn", "source", "parents")}
    assert facts == {"parameters": 656000, "dtype": "fp32", "end_of_turn": END, "source": "path", "parents": {}}
    assert stories.data["template"] == {
        "origin": "base.training_template",
        "pad_token": "<unk>",
        "in_loss": f"First ANSWER.{END}|Second ANSWER.{END}",
    }
    before = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(stories.folder)
    assert after.dtype == torch.float32
    assert after.generation_config.eos_token_id == 2 and after.generation_config.pad_token_id == 0
    ids = torch.tensor([[1, 147, 201, 282, 215]])
    assert torch.equal(before(ids).logits, after(ids).logits)


def test_the_declared_dtype_is_the_one_that_is_saved(tmp_path):
    made = make(tmp_path, plan(tmp_path, source="path", path=str(STORIES), dtype="bf16"))
    assert json.loads(made.file("config.json").read_text())["dtype"] == "bfloat16"
    assert made.file("model.safetensors").stat().st_size < 1_400_000


def test_a_model_whose_template_takes_no_system_turn_becomes_a_base(tmp_path):
    small_steps.copy_tiny_base(tmp_path / "model").unlink()
    template = tmp_path / "model/chat_template.jinja"
    refuses = "{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}"
    template.write_text(refuses + template.read_text())
    made = make(tmp_path, plan(tmp_path, source="path", path=str(tmp_path / "model")))
    assert made.data["template"]["origin"] == "the model's own" and made.data["template"]["in_loss"].count("<|im_end|>") == 2


def test_chatml_as_text_closes_a_turn_with_the_tokens_that_are_there(stories, tmp_path):
    """Token by token in the trainer's own batch; a model that saw its start-of-sequence token first still sees it."""
    tokenizer = chat.tokenizer_of(stories)
    assert len(tokenizer) == 2048  # none was added
    rows = small_steps.write_slice(tmp_path, "talk", [talk("Tell me about Tim.", "Tim was happy.")] * 8, heldout=4)
    trainer = small_steps.built_trainer(tmp_path, "sft_v2", stories.path, rows, max_length=128)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids[0] == 1 and 1 not in ids[1:]
    assert tokenizer.decode(ids[1:]).strip() == (
        f"<|im_start|>user\nTell me about Tim.{END}\n<|im_start|>assistant\nTim was happy.{END}"
    )
    inside = [i for i, label in enumerate(labels) if label != -100]
    assert (
        inside == list(range(inside[0], inside[-1] + 1)) and labels[inside[0] : inside[-1] + 1] == ids[inside[0] : inside[-1] + 1]
    )
    assert tokenizer.decode(ids[inside[0] :], skip_special_tokens=False).strip() == f"Tim was happy.{END}"
    assert ids[inside[-1]] == tokenizer.eos_token_id == 2


@pytest.mark.slow
def test_a_folder_model_trains_two_sft_steps_and_one_dpo_step(stories, tmp_path):
    long = talk("Go on.", "The cat was happy. " * 300)  # above the context: cut to max_length, and still trained on
    sft_rows = small_steps.write_slice(tmp_path, "sft", [long] + [talk(f"Tell me about cat {i}.") for i in range(11)], heldout=4)
    pair_rows = small_steps.write_slice(tmp_path, "pairs", [pair(f"Tell me about cat {i}.") for i in range(12)], heldout=4)
    size = {"per_device_train_batch_size": 4, "max_length": 512, "warmup_steps": 0}  # a warm-up's first step moves nothing
    sft = small_steps.train(tmp_path / "sft_v2", "sft_v2", stories.path, sft_rows, max_steps=2, **size)
    merged = small_steps.merge(tmp_path / "sft_v2", stories.path, sft.path)
    dpo = small_steps.train(tmp_path / "dpo", "dpo", merged.path, pair_rows, max_steps=1, **size)
    for adapter in (sft, dpo):
        assert adapter.data["adapter_moved"] == 1.0
        # r (in + out) over q, k, v, o, gate, up, down of two layers
        assert adapter.data["constant"]["trainable_parameters"] == 2 * 16 * (256 + 192 + 192 + 256 + 512 + 512 + 512)
    assert sft.data["objective"]["after"]["loss"] < sft.data["objective"]["before"]["loss"]


def test_a_prompt_that_fills_the_context_is_dropped_by_slicing_and_refused_by_training(stories, tmp_path):
    from workflow_scripts.steps.slice_data import filter_rows

    question = "Once upon a time there was a cat. " * 150
    check = slicing.Decontaminator(["Something else."], "ngram", 8, 0.5)
    kept, dropped = filter_rows([talk(question), talk("Short.")], check, chat.tokenizer_of(stories), 480)[:2]
    assert [row["messages"][0]["content"] for row in kept] == ["Short."]
    assert dropped == {"with a prompt above 480 tokens": 1}
    rows = small_steps.write_slice(tmp_path, "sft", [talk(question)] + [talk(f"Cat {i}?") for i in range(9)], heldout=4)
    with pytest.raises(InputError, match=r"row sft/0 .*a prompt that alone fills train.max_length \(512 tokens\)"):
        small_steps.train(tmp_path / "sft_v2", "sft_v2", stories.path, rows, max_steps=1, max_length=512)


def test_a_length_above_the_models_context_is_refused(stories, tmp_path):
    rows = small_steps.write_slice(tmp_path, "sft", [talk(f"Cat {i}?") for i in range(10)], heldout=4)
    with pytest.raises(InputError, match=r"methods.sft.train.max_length: found 1024, but the model's context is 512 tokens"):
        small_steps.train(tmp_path / "sft_v2", "sft_v2", stories.path, rows, max_steps=1, max_length=1024)


# -- what a real base depends on ---------------------------------------------------------------------------------------


def test_a_base_from_elsewhere_depends_on_its_files_and_not_on_prompts_machine_or_place(tmp_path):
    copied = tmp_path / "a/stories"
    shutil.copytree(STORIES, copied)
    user = user_config(tmp_path, source="path", path=str(copied))

    def mark(**over) -> str:
        return Plan(config.Config(merge(user, over))).fingerprint("base", "base")

    before = mark()
    assert mark(device="cuda", precision="bf16", threads=2, data={"slices": {"ifeval": {"rows": 7}}}) == before
    os.utime(copied / "model.safetensors")
    (copied / "README.md").write_text("another text")
    (copied / "manifest.json").write_text("{}")
    assert mark() == before
    shutil.copytree(copied, tmp_path / "b/stories")
    assert mark(base={"path": str(tmp_path / "b/stories")}) == before
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    stat = (copied / "model.safetensors").stat()
    (copied / "model.safetensors").write_bytes(weights)
    os.utime(copied / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # times decide nothing
    assert mark() != before
    assert mark(base={"dtype": "bf16"}) != mark()


def test_a_folder_that_changed_after_planning_is_refused(tmp_path):
    copied = tmp_path / "stories"
    shutil.copytree(STORIES, copied)
    planned = plan(tmp_path, source="path", path=str(copied))
    planned.step("base", "base")
    (copied / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match="changed since this step was planned"):
        make(tmp_path, planned)


def test_the_tiny_base_counts_nothing_of_the_other_sources_and_they_nothing_of_the_tiny_world(tmp_path):
    tiny = Plan(config.load(ROOT / "config/config.yaml")).step("base", "base")
    other = plan(tmp_path, source="path", path=str(STORIES)).step("base", "base")
    assert not {"models.sources", "models.templates"} & set(tiny["code"]) and not {"gguf", "trl"} & set(tiny["packages"])
    assert {"models.sources", "models.templates"} <= set(other["code"]) and {"gguf", "trl"} <= set(other["packages"])
    assert not [name for name in other["code"] if name.startswith("tiny")]


# -- refused -----------------------------------------------------------------------------------------------------------


def test_pickled_weights_are_refused_at_planning(tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(STORIES / name, folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match=r"base.path.*weights are pickled \(pytorch_model.bin\).*expected \*.safetensors"):
        plan(tmp_path, source="path", path=str(folder)).step("base", "base")


@pytest.mark.parametrize(
    ("missing", "error"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "no weights; expected"),
        ("tokenizer*", "has no tokenizer files"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, missing, error):
    shutil.copytree(STORIES, tmp_path / "stories")
    for path in (tmp_path / "stories").glob(missing):
        path.unlink()
    with pytest.raises(InputError, match=error):
        sources.folder_files(tmp_path / "stories")
    with pytest.raises(InputError, match="no such folder"):
        sources.folder_files(tmp_path / "nowhere")


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    shutil.copytree(STORIES, tmp_path / "stories")
    file = tmp_path / "stories/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "m.C"}}))
    (tmp_path / "stories/m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="transformers cannot load this model"):
        sources.from_folder(tmp_path / "stories", torch.float32)
    assert not (tmp_path / "ran").exists()


BASES = {
    "a block that the source needs": ({"source": "gguf"}, "base.gguf: missing; base.source is gguf"),
    "no dtype": ({"source": "hub", "hub": {"id": "a/b", "revision": COMMIT}, "dtype": None}, "base.dtype: missing"),
    "no revision": ({"source": "hub", "hub": {"id": "a/b"}}, "base.hub.revision: missing; .*allow_unpinned: true"),
    "a short revision": ({"source": "hub", "hub": {"id": "a/b", "revision": "main"}}, "full commit of 40 hexadecimal digits"),
    "a short sha256": ({"source": "gguf", "gguf": {"file": "x", "sha256": "ab"}}, "base.gguf.sha256: .*64 hexadecimal digits"),
    "another dtype": ({"source": "path", "path": "x", "dtype": "int8"}, "base.dtype: found the string 'int8'"),
    "no template file": ({"source": "gguf", "gguf": {"file": "x", "sha256": "0" * 64}, "training_template": "no.jinja"},
                         "base.training_template: no.jinja: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_says_too_little_is_refused_at_planning(tmp_path, case):
    base, error = BASES[case]
    user = user_config(tmp_path, **base)
    user["base"] = {key: value for key, value in user["base"].items() if value is not None}
    with pytest.raises(InputError, match=error):
        Plan(config.Config(user)).step("base", "base")


def test_a_gguf_file_is_planned_without_it_and_checked_by_sha256(tmp_path):
    file = tmp_path / "model.gguf"
    planned = plan(tmp_path, source="gguf", gguf={"file": str(file), "sha256": "0" * 64})
    assert planned.step("base", "base")["config"]["gguf"] == {"file": "model.gguf", "sha256": "0" * 64}
    with pytest.raises(InputError, match=r"model.gguf: base.gguf.file is missing; fetch it \(`make smollm2`"):
        make(tmp_path, planned)
    file.write_bytes(b"GGUF")
    with pytest.raises(InputError, match=f"sha256 is {file_sha256(file)}, but base.gguf.sha256 says 0000"):
        make(tmp_path, planned)


# -- the real GGUF file ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    if not GGUF.is_file():
        pytest.skip(f"{GGUF.relative_to(ROOT)} is not here; `make smollm2` fetches it")
    folder = tmp_path_factory.mktemp("smollm2")
    planned = Plan(config.load(ROOT / "config/smollm2.yaml"))
    return make(folder, planned, GGUF)


def test_the_gguf_of_smollm2_becomes_a_base_in_bf16(smollm2):
    import torch
    from transformers import AutoModelForCausalLM

    facts = {key: smollm2.data[key] for key in ("parameters", "dtype", "end_of_turn", "source", "parents")}
    assert facts == {"parameters": 134515008, "dtype": "bf16", "end_of_turn": "<|im_end|>", "source": "gguf", "parents": {}}
    assert smollm2.data["template"]["origin"] == "base.training_template"
    model = AutoModelForCausalLM.from_pretrained(smollm2.folder)
    assert model.dtype == torch.bfloat16 and getattr(model.config, "quantization_config", None) is None
    tokenizer = chat.tokenizer_of(smollm2)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    made = model.float().generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(made[0, ids.shape[1] :])


def test_a_real_row_trains_smollm2_on_the_answers_and_their_ends_alone(smollm2, tmp_path):
    rows = [json.loads(line) for line in (ROOT / "data/sft/oasst_en_conversations.jsonl").read_text().split("\n") if line]
    turns = next(row["messages"] for row in rows if len(row["messages"]) == 4)
    tokenizer = chat.tokenizer_of(smollm2)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    parts = [(f"<|im_start|>system\n{system}<|im_end|>\n", False)]
    for turn in turns:
        parts.append((f"<|im_start|>{turn['role']}\n", False))
        parts.append((f"{turn['content']}<|im_end|>", turn["role"] == "assistant"))
        parts.append(("\n", False))
    ids, labels = [], []
    for text, inside in parts:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if inside else [-100] * len(tokens)
    slice_file = small_steps.write_slice(tmp_path, "talk", [{"messages": turns}] * 4, heldout=2)
    trainer = small_steps.built_trainer(tmp_path, "sft_v2", smollm2.path, slice_file, max_length=2048, quantise="none")
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["input_ids"][0].tolist() == ids
    assert batch["labels"][0].tolist() == labels


@pytest.mark.parametrize("files", [["smollm2"], ["smollm2", "smollm2_quick"]], ids=" ".join)
def test_the_shipped_configs_plan_without_the_model(files, monkeypatch, tmp_path):
    made = config.load(*[ROOT / f"config/{name}.yaml" for name in files])
    made.data["base"]["gguf"]["file"] = str(tmp_path / "not-here.gguf")
    monkeypatch.chdir(ROOT)
    planned = Plan(made)
    planned.check()
    assert planned.results == f"results/{files[-1]}"
    methods = {"sft_v1", "sft_v2", "dpo", "dpo_4bit", "kto", "rm", "ppo", "grpo", "rloo", "grpo_if", "rloo_if", "grpo_rm"}
    others = {
        "rloo_rm",
        "grpo_random",
        "grpo_shuffled",
        "dpo_flipped",
        "dpo_study",
        "sft_ruined",
        "simpo",
        "orpo",
        "rft",
        "dpo_onpolicy",
    }
    assert set(made.experiments) == methods | others
    assert made.experiments["dpo_study"]["train"]["learning_rate"] == 5.0e-6
