"""End of turn, loss masks and rows: what a batch trains on, token by token, and what is refused."""

import pytest

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.models import chat
from workflow_scripts.plumbing.messages import InputError

IGNORE = -100
TALK = [
    ("system", "be kind."),
    ("user", "write about cats."),
    ("assistant", "cats are warm."),
    ("user", "and dogs?"),
    ("assistant", "dogs are warm too."),
]
PAIR = {
    "prompt": [{"role": "user", "content": "write about cats."}],
    "chosen": [{"role": "assistant", "content": "cats are warm. they wait."}],
    "rejected": [{"role": "assistant", "content": "Dogs."}],
}
# An end of turn outside the generation span: the mask lacks it.
END_OUTSIDE = (
    "{{- message['content'] + '<|im_end|>' }}\n        {%- endgeneration %}",
    "{{- message['content'] }}\n        {%- endgeneration %}{{- '<|im_end|>' }}",
)


@pytest.fixture(scope="module")
def tokenizer(base):
    return chat.tokenizer_of(manifests.read(base))


def talk_slice(folder, n=12):
    rows = [{"messages": [{"role": role, "content": f"{i} {text}"} for role, text in TALK]} for i in range(n)]
    return small_steps.write_slice(folder, "talk", rows, heldout=4)


# -- the end of a turn ------------------------------------------------------------------------------------------------


def test_the_end_of_turn_is_the_token_that_the_template_writes_after_an_answer(tokenizer):
    assert tokenizer.convert_ids_to_tokens(chat.end_of_turn(tokenizer)) == "<|im_end|>"


def test_a_template_that_closes_turns_with_another_token_is_refused(base, tmp_path):
    other = small_steps.copy_base(base, tmp_path / "other", ("'<|im_end|>'", "'<|endoftext|>'"))
    with pytest.raises(InputError, match=r"writes '<\|endoftext\|>.*end-of-sequence token is '<\|im_end\|>'"):
        chat.end_of_turn(chat.tokenizer_of(manifests.read(other)))


def test_a_tokenizer_whose_end_is_the_start_of_turn_is_refused(base, tmp_path):
    other = small_steps.copy_base(base, tmp_path / "other", eos_token="<|im_start|>")
    with pytest.raises(InputError, match=r"end-of-sequence token is '<\|im_start\|>'.*Set eos_token"):
        chat.end_of_turn(chat.tokenizer_of(manifests.read(other)))


@pytest.mark.parametrize("template, says", [(None, "has no chat template"), ("{{ 'always this' }}", "writes '' after an answer")])
def test_a_template_that_is_missing_or_leaves_the_answer_out_is_refused(base, template, says):
    tokenizer = chat.tokenizer_of(manifests.read(base))
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=says):
        chat.end_of_turn(tokenizer)


# -- the check on each batch ------------------------------------------------------------------------------------------


def batch(tokens, on, completion=False):
    """A batch of one row whose positions `on` carry a loss."""
    import torch

    ids = torch.tensor([tokens])
    mask = torch.tensor([[i in on for i in range(len(tokens))]])
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return made | ({"completion_mask": mask.long()} if completion else {"labels": ids.masked_fill(~mask, IGNORE)})


@pytest.mark.parametrize("completion", [False, True], ids=["labels", "completion_mask"])
@pytest.mark.parametrize(
    "tokens, on, max_length, says",
    [
        ([5, 6, 7, 2], {2, 3}, 8, None),
        ([5, 6, 7, 2], set(), 8, "row 0 .* no token with a loss.*generation"),
        ([5, 6, 7, 2], set(), 4, "fills max_length"),  # cut: its prompt is all that is left
        ([5, 2, 7, 8], {2, 3}, 8, "does not train the end-of-turn token"),  # the user's end of turn does not count
        ([5, 6, 7, 8], {2, 3}, 8, "does not train the end-of-turn token"),
        ([5, 6, 7, 8], {2, 3}, 4, None),  # cut: the end went with the rest
    ],
)
def test_a_batch_needs_a_loss_and_the_end_of_the_answer(tokens, on, max_length, says, completion):
    check = chat.MaskCheck(lambda rows: rows[0], 2, max_length)
    made = batch(tokens, on, completion)
    if says is None:
        assert check([made]) is made
    else:
        with pytest.raises(InputError, match=says):
            check([made])


def test_one_bad_row_among_good_ones_is_found():
    import torch

    good, bad = batch([5, 6, 7, 2], {2, 3}), batch([5, 6, 7, 2], {2})
    both = {key: torch.cat([good[key], bad[key]]) for key in good}
    with pytest.raises(InputError, match="row 1 of a batch"):
        chat.MaskCheck(lambda rows: both, 2, 8)([])


# -- the masks of the real steps --------------------------------------------------------------------------------------


def by_hand(tokenizer, messages):
    """(ids, labels under v2) of a conversation, put together piece by piece."""
    ids, labels = [], []
    for message in messages:
        for text, on in (
            (f"<|im_start|>{message['role']}\n", False),
            (f"{message['content']}<|im_end|>", message["role"] == "assistant"),
            ("\n", False),
        ):
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            labels += piece if on else [IGNORE] * len(piece)
    return ids, labels


@pytest.mark.parametrize("experiment", ["sft_v1", "sft_v2"])
def test_v2_trains_on_the_assistants_turns_and_v1_on_every_token(experiment, base, tokenizer, folder, tmp_path):
    slice_ = talk_slice(folder / "talk")
    trainer = small_steps.built_trainer(tmp_path / experiment, experiment, base, slice_)
    rows = manifests.read(slice_).rows(heldout=False)
    made = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    for i in range(3):
        ids, labels = by_hand(tokenizer, rows[i]["messages"])
        if experiment == "sft_v1":
            labels = ids
        length = int(made["attention_mask"][i].sum())
        assert made["input_ids"][i, :length].tolist() == ids
        assert made["labels"][i, :length].tolist() == labels
        assert (made["labels"][i, length:] == IGNORE).all()


def test_a_dpo_batch_trains_on_the_answers_and_their_end_of_turn(base, tokenizer, folder, tmp_path):
    slice_ = small_steps.write_slice(folder / "pair", "pairs", [PAIR] * 12, heldout=4)
    trainer = small_steps.built_trainer(tmp_path / "dpo", "dpo", base, slice_)
    made = trainer.data_collator([trainer.train_dataset[0]])
    prompt = tokenizer("<|im_start|>user\nwrite about cats.<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    for i, answer in enumerate(("chosen", "rejected")):
        answer_ids = tokenizer(PAIR[answer][0]["content"] + "<|im_end|>\n")["input_ids"]  # the template ends turns with a line
        length = int(made["attention_mask"][i].sum())
        assert made["input_ids"][i, :length].tolist() == prompt + answer_ids
        assert made["completion_mask"][i].tolist()[:length] == [0] * len(prompt) + [1] * len(answer_ids)
        assert made["completion_mask"][i, length:].sum() == 0


# -- what the steps refuse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "experiment, template, says",
    [
        ("sft_v2", END_OUTSIDE, "does not train the end-of-turn token"),
        ("dpo", ("'<|im_end|>'", "'<|endoftext|>'"), "end-of-sequence token"),
    ],
)
def test_a_broken_template_stops_training(experiment, template, says, base, slices, tmp_path):
    broken = small_steps.copy_base(base, tmp_path / "broken", template)
    with pytest.raises(InputError, match=says):
        small_steps.train(tmp_path / "run", experiment, broken, slices[experiment])
    assert not (tmp_path / "run" / "adapter" / "manifest.json").exists()


def test_a_template_without_generation_spans_stops_training_on_answers_and_not_on_everything(base, slices, tmp_path):
    text = (base.parent / "chat_template.jinja").read_text()
    bare = text.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    broken = small_steps.copy_base(base, tmp_path / "broken", (text, bare))
    with pytest.raises(Exception, match="`{% generation %}` markers"):
        small_steps.train(tmp_path / "v2", "sft_v2", broken, slices["sft_v2"])
    small_steps.built_trainer(tmp_path / "v1", "sft_v1", broken, slices["sft_v2"])  # v1 has no use for them


def test_a_collator_that_masks_everything_stops_training(base, slices, tmp_path, monkeypatch):
    from trl.trainer import sft_trainer

    right = sft_trainer.DataCollatorForLanguageModeling.torch_call

    def wrong(self, rows):
        made = right(self, rows)
        return made | {"labels": made["labels"].fill_(IGNORE)}

    monkeypatch.setattr(sft_trainer.DataCollatorForLanguageModeling, "torch_call", wrong)
    with pytest.raises(InputError, match="no token with a loss"):
        small_steps.train(tmp_path / "run", "sft_v2", base, slices["sft_v2"])
    assert not (tmp_path / "run" / "adapter" / "manifest.json").exists()


def test_a_prompt_that_fills_max_length_is_refused_by_name_and_not_dropped(base, slices, tmp_path):
    """SFT's. Of pairs, what is too long is left out by name and count: tests/training/test_methods_input.py."""
    with pytest.raises(InputError, match=r"row sft/\d+ .* alone fills train.max_length \(20 tokens\)"):
        small_steps.train(tmp_path / "run", "sft_v2", base, slices["sft_v2"], max_length=20)


def test_an_answer_that_is_cut_still_trains(base, slices, tmp_path, tokenizer):
    rows = manifests.read(slices["sft_v2"]).rows()
    prompts = [tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"] for row in rows]
    longest = max(map(len, prompts))
    adapter = small_steps.train(tmp_path / "run", "sft_v2", base, slices["sft_v2"], max_length=longest + 2)
    assert adapter.data["adapter_moved"] == 1.0


def test_a_slice_without_heldout_rows_is_refused(base, folder, tmp_path):
    none = small_steps.write_slice(folder / "none", "sft", small_steps.world.sft_rows(16, 1, 0.5, 0.1), heldout=0)
    with pytest.raises(InputError, match="has no held-out rows"):
        small_steps.train(tmp_path / "run", "sft_v2", base, none)


@pytest.mark.parametrize("experiment", ["sft_v2", "dpo"])
def test_a_loss_that_is_not_a_number_stops_training_and_leaves_nothing(experiment, base, slices, tmp_path):
    with pytest.raises(InputError, match=r"run: .*loss is nan at step \d+; lower the learning rate"):
        small_steps.train(tmp_path / "run", experiment, base, slices[experiment], learning_rate=1e30, num_train_epochs=3)
    assert not (tmp_path / "run" / "adapter" / "manifest.json").exists()


def test_weights_that_are_not_numbers_stop_before_training(base, slices, tmp_path, monkeypatch):
    from workflow_scripts.models import loading

    right = loading.load

    def broken(*args):
        model = right(*args)
        next(p for p in model.parameters() if p.is_floating_point()).data[:] = float("nan")
        return model

    monkeypatch.setattr(loading, "load", broken)
    with pytest.raises(InputError, match="eval_loss is nan at step 0"):
        small_steps.train(tmp_path / "run", "sft_v2", base, slices["sft_v2"])
