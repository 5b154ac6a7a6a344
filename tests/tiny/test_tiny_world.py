"""The tiny world against lm-eval's own checkers, and its template and tokenizer against what the trainers rely on."""

import random
import re
from collections import Counter

import pytest

from workflow_scripts.evaluation import ifeval
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tiny import world
from workflow_scripts.tiny.answers import default_answer, following_answer


@pytest.fixture(scope="module")
def follows():
    """follows(row, answer): lm-eval's strict verdict on all instructions of an IFEval row."""
    with ifeval.reference() as utils:
        yield lambda row, answer: utils.process_results(row, [answer])["prompt_level_strict_acc"]


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer as the base model's config asks for it, trained on fewer documents."""
    from workflow_scripts.tiny.pretrain import build_tokenizer

    cfg = {"tokenizer": {"vocab_size": 960}, "model": {"max_position_embeddings": 256}}
    return build_tokenizer(cfg, world.documents(2000, 1, follow=0.5, numeric=0.2))


def tasks(n):
    """Tasks of any split with their rows in IFEval's format; `_task` is the generator behind every kind of row."""
    rng = random.Random(3)
    drawn = [world.draw_task(rng) for _ in range(n)]
    return [(task, world.ifeval_row(key, task)) for key, task in enumerate(drawn)]


def test_answers_that_follow_pass_the_real_checkers_and_default_answers_hardly_ever_do(follows):
    rng = random.Random(4)
    drawn = tasks(1500)
    good = [follows(row, following_answer(rng, task.topic, task.instructions)) for task, row in drawn]
    ignoring = [follows(row, default_answer(rng, task.topic)) for task, row in drawn]
    assert sum(good) / len(good) >= 0.98
    assert sum(ignoring) / len(ignoring) <= 0.02


def test_own_checks_agree_with_the_real_checkers_on_answers_to_other_prompts(follows):
    rng = random.Random(5)
    drawn = tasks(1000)
    answers = [following_answer(rng, task.topic, task.instructions) for task, _ in drawn]
    pairs = [(task, row, answer) for (task, row), answer in zip(drawn, answers[1:] + answers[:1], strict=True)]
    agree = [task.followed_by(answer) == follows(row, answer) for task, row, answer in pairs]
    assert sum(agree) / len(agree) >= 0.99
    assert 0 < sum(task.followed_by(answer) for task, _, answer in pairs) < len(pairs)


def test_chosen_passes_and_rejected_fails_the_real_checkers(follows):
    rows = world.preference_rows(600, 2)
    by_prompt = {row["prompt"]: row for row in world.eval_rows(2500, 7, split="pairs")}
    judged = [(by_prompt[row["prompt"][0]["content"]], row) for row in rows if row["prompt"][0]["content"] in by_prompt]
    assert len(judged) >= 100
    chosen = [follows(row, pair["chosen"][0]["content"]) for row, pair in judged]
    rejected = [follows(row, pair["rejected"][0]["content"]) for row, pair in judged]
    assert sum(chosen) / len(chosen) >= 0.98
    assert sum(rejected) == 0


def test_rejected_answers_are_half_default_and_half_another_prompts_following():
    rows = world.preference_rows(1000, 1)
    default = re.compile(r"[A-Z]\w+ are \w+, \w+ and \w+\. They [^.]+, and [^.]+\.")
    plain = [bool(default.fullmatch(row["rejected"][0]["content"])) for row in rows]
    assert 0.45 <= sum(plain) / len(plain) <= 0.6  # a forbidden word's follower can look like the default
    assert all(row["chosen"] != row["rejected"] for row in rows)


def prompts_of(split):
    if split in ("dev", "eval"):
        return [row["prompt"] for row in world.eval_rows(600, 1, split)]
    if split == "pairs":
        return [row["prompt"][0]["content"] for row in world.preference_rows(2000, 1)]
    if split == "sft":
        return [row["messages"][0]["content"] for row in world.sft_rows(2333, 1, follow=0.4, numeric=0.15)]
    return [row["messages"][0]["content"] for row in world.documents(5000, 1, follow=0.3, numeric=0.15)]


def test_no_two_splits_share_a_prompt_and_slices_have_no_prompt_twice():
    prompts = {split: prompts_of(split) for split in world.SPLITS}
    for split, found in prompts.items():
        assert {world.split_of(prompt) for prompt in found} == {split}
        if split != "pretrain":
            assert len(set(found)) == len(found)
    sums = {split: [row["prompt"] for row in world.numeric_rows(150, 1, split)] for split in world.SPLITS}
    assert sum(len(set(found)) for found in sums.values()) == len(set().union(*sums.values())) == 750


def test_same_seed_same_rows_and_other_seed_other_rows():
    makers = (
        lambda seed: world.eval_rows(50, seed),
        lambda seed: world.sft_rows(50, seed, follow=0.5, numeric=0.2),
        lambda seed: world.preference_rows(50, seed),
        lambda seed: world.numeric_rows(50, seed, "sft"),
        lambda seed: world.documents(50, seed, follow=0.5, numeric=0.2),
    )
    for make in makers:
        assert make(1) == make(1) != make(2)
        assert len(make(1)) == 50


def test_rows_do_not_change_between_versions_and_processes():
    # Taken down once: whoever changes the world must know that every base model and score changes with it.
    prompt = world.eval_rows(2, 1)[0]["prompt"]
    assert prompt == "tell me about stars. add double quotes around it."
    assert [world.split_of(f"prompt {i}") for i in range(6)] == ["pretrain", "sft", "eval", "pretrain", "pretrain", "sft"]


def test_prompts_have_one_or_two_of_at_least_ten_ifeval_kinds():
    rows = world.eval_rows(600, 1)
    kinds = Counter(kind for row in rows for kind in row["instruction_id_list"])
    assert len(kinds) >= 10
    assert min(kinds.values()) >= 20
    assert 0.55 <= sum(len(row["instruction_id_list"]) == 1 for row in rows) / len(rows) <= 0.65
    assert all(len(row["instruction_id_list"]) == len(row["kwargs"]) in (1, 2) for row in rows)


def test_the_share_of_following_and_of_right_answers_is_the_one_asked_for(follows):
    rows = world.sft_rows(1000, 1, follow=0.4, numeric=0.2)
    texts = [[message["content"] for message in row["messages"]] for row in rows]
    sums = [re.findall(r"\d+", answer) for prompt, answer in texts if "how many" in prompt]
    right = [int(a) + int(b) == int(total) for a, b, total in sums]
    assert len(sums) == 200
    assert sum(right) == 80
    assert all(int(total) - int(a) - int(b) in (0, 1) for a, b, total in sums)
    by_prompt = {row["prompt"]: row for row in world.eval_rows(3000, 9, split="sft")}
    judged = [follows(by_prompt[prompt], answer) for prompt, answer in texts if prompt in by_prompt]
    assert len(judged) >= 100
    assert 0.28 <= sum(judged) / len(judged) <= 0.52


def test_sums_are_right_and_more_than_there_are_is_refused():
    for row in world.numeric_rows(200, 1, "eval"):
        a, b = map(int, re.findall(r"\d+", row["prompt"]))
        assert row["final"] == a + b
        assert row["answer"] == f"{a} plus {b} is {a + b}."
    with pytest.raises(InputError, match="split eval"):
        world.numeric_rows(2000, 1, "eval")
    with pytest.raises(InputError, match="'test'"):
        world.eval_rows(5, 1, split="test")


def test_assistant_mask_covers_exactly_the_answer_and_the_end_of_turn(tokenizer):
    for row in world.sft_rows(50, 1, follow=0.5, numeric=0.2):
        out = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        masked = [i for i, on in zip(out["input_ids"], out["assistant_masks"], strict=True) if on]
        assert tokenizer.decode(masked) == row["messages"][1]["content"] + "<|im_end|>"
        assert masked[-1] == tokenizer.eos_token_id


def test_prompt_with_generation_prompt_is_a_prefix_of_the_conversation(tokenizer):
    for row in world.sft_rows(50, 1, follow=0.5, numeric=0.2):
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=True, add_generation_prompt=True)["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert tokenizer.decode(whole[len(prompt) :]) == row["messages"][1]["content"] + "<|im_end|>\n"


def test_tokenizer_is_lossless_and_splits_digits(tokenizer):
    texts = [message["content"] for row in world.documents(500, 2, 0.5, 0.2) for message in row["messages"]]
    texts += [answer[0]["content"] for row in world.preference_rows(500, 1) for answer in (row["chosen"], row["rejected"])]
    texts += [row["prompt"] for split in ("dev", "eval") for row in world.eval_rows(300, 1, split)]
    texts += ["Ünïcode, tabs\tand 1234 \u4e16\u754c  double  spaces"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode(token) for token in tokenizer("25 words")["input_ids"]] == ["2", "5", " words"]


def test_special_tokens_keep_their_roles(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tokenizer("<|im_start|>user\nhi<|im_end|>\n")["input_ids"]
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.eos_token_id in ids
