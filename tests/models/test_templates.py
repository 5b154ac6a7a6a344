"""Which chat template a model trains with, and that its loss is on the answers and the ends of turns, token by token."""

from pathlib import Path

import pytest
import trl

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.fingerprint import ROOT
from workflow_scripts.models import chat, templates
from workflow_scripts.plumbing.messages import InputError

TRL = Path(trl.__file__).parent / "chat_templates"
QWEN = (TRL / "qwen2_5.jinja").read_text()
SMOLLM2 = (ROOT / "workflow_scripts/models/chat_templates/smollm2.jinja").read_text()
CHATML = (ROOT / "workflow_scripts/models/chat_templates/chatml_text.jinja").read_text()
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# What SmolLM2-Instruct comes with: no markers, and a system turn of its own where a conversation has none.
SMOLLM2_OWN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + DEFAULT_SYSTEM
    + "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "Write about cats."},
    {"role": "assistant", "content": "Cats are warm."},
    {"role": "user", "content": "And dogs?"},
    {"role": "assistant", "content": "Dogs too."},
]


@pytest.fixture
def tokenizer(base):
    """A tokenizer with ChatML's special tokens; a test gives it the template of another model."""
    return chat.tokenizer_of(manifests.read(base))


def masked(tokenizer, turns) -> tuple[list[int], list[int]]:
    """(tokens, 1 where there is a loss) of a conversation."""
    made = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    return made["input_ids"], made["assistant_masks"]


def pieces(tokenizer, *parts: tuple[str, int]) -> tuple[list[int], list[int]]:
    """The same, from pieces of text written out by hand, each cut into tokens by itself."""
    ids = [(tokenizer(text, add_special_tokens=False)["input_ids"], inside) for text, inside in parts]
    return [i for part, _ in ids for i in part], [inside for part, inside in ids for _ in part]


# -- the order ---------------------------------------------------------------------------------------------------------


def test_the_models_own_template_comes_first_if_it_has_markers(tokenizer):
    own = tokenizer.chat_template
    facts = templates.install(tokenizer, CHATML, None)
    assert tokenizer.chat_template == own
    assert (facts["origin"], facts["unused"]) == ("the model's own", "base.training_template")


def test_named_templates_stand_for_their_default_one(tokenizer):
    own = tokenizer.chat_template
    tokenizer.chat_template = {"default": own, "tool_use": "{{ 1 }}"}
    assert templates.install(tokenizer, None, None)["origin"] == "the model's own"
    assert tokenizer.chat_template == own


def test_trls_template_of_the_family_comes_second(tokenizer):
    tokenizer.chat_template = QWEN
    facts = templates.install(tokenizer, CHATML, None)
    assert facts["origin"] == "TRL's training template of the model's family"
    assert tokenizer.chat_template == (TRL / "qwen2_5_training.jinja").read_text()
    system = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    assert masked(tokenizer, TALK) == pieces(  # TRL's has the line breaks around an answer in the loss as well
        tokenizer,
        (f"{system}<|im_start|>user\nWrite about cats.<|im_end|>\n<|im_start|>assistant", 0),
        ("\nCats are warm.<|im_end|>\n", 1),
        ("<|im_start|>user\nAnd dogs?<|im_end|>\n<|im_start|>assistant", 0),
        ("\nDogs too.<|im_end|>\n", 1),
    )


def test_the_file_that_the_config_names_comes_third(tokenizer):
    tokenizer.chat_template = SMOLLM2_OWN
    facts = templates.install(tokenizer, SMOLLM2, None)
    assert facts == {
        "origin": "base.training_template",
        "pad_token": tokenizer.pad_token,
        "in_loss": "First ANSWER.<|im_end|>|Second ANSWER.<|im_end|>",
    }
    assert masked(tokenizer, TALK) == pieces(
        tokenizer,
        (f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\nWrite about cats.<|im_end|>\n", 0),
        ("<|im_start|>assistant\n", 0),
        ("Cats are warm.<|im_end|>", 1),
        ("\n<|im_start|>user\nAnd dogs?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("Dogs too.<|im_end|>", 1),
        ("\n", 0),
    )


def test_smollm2s_template_writes_what_the_models_own_writes(tokenizer):
    system = [{"role": "system", "content": "Be kind."}]
    for turns in (TALK, TALK[:1], TALK[:3], system + TALK, system + TALK[:1]):
        for ask in (False, True):
            texts = [
                tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=ask)
                for template in (SMOLLM2_OWN, SMOLLM2)
            ]
            assert texts[0] == texts[1]
            assert (DEFAULT_SYSTEM in texts[0]) == (turns[0]["role"] != "system")


def test_no_template_with_markers_is_an_error_that_says_how_to_write_one(tokenizer):
    tokenizer.chat_template = SMOLLM2_OWN
    with pytest.raises(InputError, match=r"without generation markers.*put \{% generation %\} before.*base.training_template"):
        templates.install(tokenizer, None, None)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"has no chat template.*training_template: chatml_text"):
        templates.install(tokenizer, None, None)


# -- what a template must be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("{%- generation %}", "", "Encountered unknown tag|no generation markers"),
        ("named SmolLM", "named Tim", r"writes another text than the model's own template.*expected ' AI assistant named SmolLM"),
        ("'<|im_end|>' }}{%- endgeneration %}", "'' }}{%- endgeneration %}{{- '<|im_end|>' }}", "expected two spans"),
        ("{{- '<|im_start|>' + message['role'] + '\\n' }}", "{%- generation %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
         "{%- endgeneration %}", "expected two spans"),
    ],
    ids=["no-markers", "other-text", "end-outside", "headers-inside"],
)  # fmt: skip
def test_a_file_that_masks_or_writes_something_else_is_refused(tokenizer, old, new, error):
    assert old in SMOLLM2
    broken = SMOLLM2.replace(old, new)
    if "markers" in error:
        broken = broken.replace("{%- endgeneration %}", "")
    tokenizer.chat_template = SMOLLM2_OWN
    with pytest.raises(InputError, match=error):
        templates.install(tokenizer, broken, None)


def test_a_template_that_writes_earlier_turns_in_another_way_later_is_refused(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- for message in messages %}", "{{- messages | length }}{%- for message in messages %}"
    )
    with pytest.raises(InputError, match="turn 1 is not a prefix of a conversation that goes on after it"):
        templates.install(tokenizer, None, None)


def test_the_end_of_turn_goes_by_its_text_and_adds_no_token(tokenizer):
    size = len(tokenizer)
    tokenizer.eos_token = "<|im_start|>"  # as one release reads it from a GGUF file
    with pytest.raises(InputError, match=r"writes '<\|im_end\|>.*end-of-sequence token is '<\|im_start\|>'.*base.end_of_turn"):
        templates.install(tokenizer, None, None)
    facts = templates.install(tokenizer, None, "<|im_end|>")
    assert (tokenizer.eos_token, facts["eos_token_was"]) == ("<|im_end|>", "<|im_start|>")
    with pytest.raises(InputError, match=r"'<\|eot\|>' is not a token of this tokenizer, and none is added"):
        templates.install(tokenizer, None, "<|eot|>")
    assert len(tokenizer) == size


def test_a_declared_end_of_turn_that_the_template_does_not_write_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"writes '<\|im_end\|>.*the end-of-sequence token is '<\|endoftext\|>'"):
        templates.install(tokenizer, None, "<|endoftext|>")


@pytest.mark.parametrize(("unknown", "chosen"), [("<|endoftext|>", "<|endoftext|>"), (None, "<|im_end|>")])
def test_a_missing_padding_token_is_the_unknown_one_or_the_end_of_turn(tokenizer, unknown, chosen):
    tokenizer.pad_token, tokenizer.unk_token = None, unknown
    facts = templates.install(tokenizer, None, None)
    assert (tokenizer.pad_token, facts["pad_token"], facts["pad_token_was"]) == (chosen, chosen, None)


# -- token by token, as the trainer batches it -------------------------------------------------------------------------


def test_the_tiny_worlds_batch_has_a_loss_on_answers_and_ends_of_turns_alone(base, tokenizer, tmp_path):
    rows = small_steps.write_slice(tmp_path, "talk", [{"messages": TALK}] * 8, heldout=4)
    trainer = small_steps.built_trainer(tmp_path, "sft_v2", base, rows, max_length=128)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    ids, inside = pieces(
        tokenizer,
        ("<|im_start|>user\nWrite about cats.<|im_end|>\n<|im_start|>assistant\n", 0),
        ("Cats are warm.<|im_end|>", 1),
        ("\n<|im_start|>user\nAnd dogs?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("Dogs too.<|im_end|>", 1),
        ("\n", 0),
    )
    assert batch["input_ids"][0].tolist() == ids
    assert batch["labels"][0].tolist() == [i if keep else -100 for i, keep in zip(ids, inside, strict=True)]


# -- today -------------------------------------------------------------------------------------------------------------

DATED = "{%- if messages[0]['role'] != 'system' %}{{- 'Today is ' + strftime_now('%d %b %Y') + '.' }}{%- endif %}"


def test_a_template_that_writes_todays_date_writes_one_day_for_ever(tokenizer):
    tokenizer.chat_template = DATED + tokenizer.chat_template
    assert templates.install(tokenizer, None, None)["date"] == "2024-07-26"
    assert "Today is 26 Jul 2024." in tokenizer.apply_chat_template(TALK, tokenize=False)
    assert "strftime_now" not in tokenizer.chat_template


def test_a_template_that_asks_for_the_time_in_another_way_is_refused(tokenizer):
    tokenizer.chat_template = DATED.replace("'%d %b %Y'", "form") + tokenizer.chat_template
    with pytest.raises(InputError, match=r"writes the time of day .*strftime_now.form.*base.training_template"):
        templates.install(tokenizer, None, None)


def test_a_family_that_trl_knows_by_its_dated_template_is_known_all_the_same(tokenizer):
    """Its family goes by the very text of its template."""
    from trl.chat_template_utils import get_training_chat_template

    tokenizer.chat_template = (TRL / "gptoss.jinja").read_text()
    wanted = get_training_chat_template(tokenizer)
    template, facts = templates.select(tokenizer, None)
    assert template == wanted and facts["origin"].startswith("TRL's")
    assert "strftime_now(" not in templates.undated((TRL / "gptoss.jinja").read_text())


@pytest.mark.parametrize("broken", ["{{ now() }}", "{% if %}", "{{ raise_exception('only tools') }}"])
def test_a_template_that_can_not_write_a_plain_conversation_is_named(tokenizer, broken):
    tokenizer.chat_template = broken + tokenizer.chat_template
    with pytest.raises(InputError, match=r"chat template of .*: can't write a question and its answer .*base.training_template"):
        templates.install(tokenizer, None, None)


def test_a_template_without_a_date_has_none(tokenizer):
    assert "date" not in templates.install(tokenizer, None, None)


def test_the_remedy_for_a_template_that_asks_for_the_time_is_one(tokenizer):
    given = tokenizer.chat_template
    tokenizer.chat_template = "{%- set form = '%H:%M' %}{{- strftime_now(form) }}{{- messages[0]['content'] }}"
    facts = templates.install(tokenizer, given, None)
    assert facts["origin"] == "base.training_template" and "writes the time of day" in facts["differs"]
    assert tokenizer.chat_template == given
