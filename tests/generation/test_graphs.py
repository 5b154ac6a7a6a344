"""The backend `graphs` answers as `generate` does, and whatever is answered beside an answer changes nothing in it."""

import functools

import pytest
import torch

from tests.generation.conftest import ENDS, NEW, greedy, model_of, parted
from workflow_scripts.generation import attention, decoder, generator
from workflow_scripts.generation import graphs as of_graphs
from workflow_scripts.generation.answers import Asked
from workflow_scripts.generation.graphs import Graphs
from workflow_scripts.models import distance, loading

GREEDY = Asked(ENDS, NEW)


def answers(engine, prompts, asked=GREEDY):
    found = {}
    engine.answer([*enumerate(prompts)], asked, lambda place, sample, made: found.__setitem__((place, sample), made))
    assert len(found) == len(prompts) * asked.samples
    return found


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("Llama", "Qwen3")]  # one in `make test-quick`


@pytest.fixture(scope="module", params=["Qwen2", *OTHERS])
def architecture(request):
    return request.param


@pytest.fixture(scope="module", params=["base", "adapter"])
def adapter(request):
    return request.param == "adapter"


@pytest.fixture(scope="module")
def model(architecture, adapter):
    return model_of(architecture, adapter)


@pytest.fixture(scope="module")
def of_generate(prompts):
    """What `generate` answers with such a model."""

    def answered(architecture, adapter):
        model = model_of(architecture, adapter)
        return [greedy(model, prompt) for prompt in prompts]

    return functools.cache(answered)


@pytest.fixture(scope="module")
def theirs(of_generate, architecture, adapter):
    return of_generate(architecture, adapter)


def wrong(model, prompts, theirs, slots=11) -> int:
    """How many answers are others than those of `generate`."""
    return wrong_with(Graphs(model, slots, 100), model, prompts, theirs)


def wrong_with(engine, model, prompts, theirs) -> int:
    made = answers(engine, prompts)
    return sum(parted(model, prompts[i], made[i, 0].tokens, one) for i, one in enumerate(theirs))


def test_the_answers_are_those_of_generate(model, prompts, theirs):
    made = answers(Graphs(model, 11, 100), prompts)
    assert not [i for i, one in enumerate(theirs) if parted(model, prompts[i], made[i, 0].tokens, one)]
    assert {made[i, 0].stopped for i in range(len(prompts))} == {True, False}
    assert all(one.stopped == (one.tokens[-1] in ENDS) for one in made.values())


def test_the_model_itself_computes_as_before_with_weights_that_are_now_views(architecture, prompts):
    model, same = model_of(architecture, True), model_of(architecture, True)
    Graphs(model, 4, 100)
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, same(ids).logits)
    attend = model.model.layers[1].self_attn
    stores = {getattr(attend, f"{name}_proj").base_layer.weight.untyped_storage().data_ptr() for name in "qkv"}
    assert len(stores) == 1  # a base is in memory once


FAULTS = {
    "a wrong position": lambda m: m.setattr(
        decoder, "rotate", lambda x, cos, sin, right=decoder.rotate: right(x, cos.roll(1, 0), sin.roll(1, 0))
    ),
    "a stale slot": lambda m: m.setattr(Graphs, "_through", lambda self, rows: iter(())),
    "a missing end of turn": lambda m: m.setattr(torch, "isin", lambda token, ends: torch.zeros_like(token, dtype=torch.bool)),
    "an end that is cut off": lambda m: m.setattr(attention, "of_slots", shorter(attention.of_slots)),
    "an answer that is not moved whole": lambda m: m.setattr(Graphs, "_gathered", forgetful(Graphs._gathered)),
}


def shorter(right):
    return lambda rows, at, longest: right(rows, (at - 1).clamp(min=0), longest)


def forgetful(right):
    def gathered(self, held):
        before = set(held)
        rows = right(self, held)
        for slot in set(held) - before:
            self.state.at[slot] += 1
        return rows

    return gathered


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, prompts, of_generate, monkeypatch):
    model, theirs = model_of("Qwen2", True), of_generate("Qwen2", True)
    FAULTS[fault](monkeypatch)
    monkeypatch.setattr(of_graphs, "CPU_ROWS", 4)  # so that answers move
    assert wrong(model, prompts, theirs) > 0


@pytest.mark.parametrize("asked", [GREEDY, Asked(ENDS, NEW, temperature=1.0, samples=2, logprobs=True, seed=3)])
def test_neither_slots_nor_what_is_beside_it_changes_an_answer(asked, prompts):
    model = model_of("Llama", True)
    whole = answers(Graphs(model, 37, 100), prompts, asked)
    for slots, part in ((7, prompts), (16, prompts[:9]), (1, prompts[:2])):
        for place, made in answers(Graphs(model, slots, 100), part, asked).items():
            assert made.tokens == whole[place].tokens, (slots, place)


@pytest.mark.slow
def test_each_engine_of_a_process_has_compiled_code_of_its_own(prompts, monkeypatch):
    """torch compiles at most eight kinds of one function, and runs the ninth as it stands: another rounding on a GPU. That error
    is what comes of `fullgraph` there. Traced on a CPU, and not compiled."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for n in range(10):
        model = model_of(("Qwen2", "Qwen3")[n % 2], n % 3 > 0, (torch.float32, torch.bfloat16)[n // 2 % 2])
        engine = Graphs(model, 4 + n, 100)
        engine.decoder.compiled()
        engine.take = of_graphs.compile_own(of_graphs.take)
        asked = Asked(ENDS, 4, temperature=float(n % 2), logprobs=n > 5)
        made, plain = (answers(one, prompts[:2], asked) for one in (engine, Graphs(model, 4 + n, 100)))
        assert [made[key].tokens for key in made] == [plain[key].tokens for key in made]


def test_another_adapter_is_a_copy_into_the_same_buffers(prompts):
    model = model_of("Qwen2", True)
    engine = Graphs(model, 11, 100)
    for _, module, *_ in engine.decoder._places():
        module.lora_B["default"].weight.data *= -2
    theirs = [greedy(model, prompt) for prompt in prompts]
    assert wrong_with(engine, model, prompts, theirs) > 3  # the old one is still in the buffers
    engine.load()
    assert wrong_with(engine, model, prompts, theirs) == 0


def test_an_adapter_does_on_this_path_what_it_does_on_pefts(architecture, prompts):
    model = model_of(architecture, True)
    path = generator.InSlots(model, 4, 100, exact=False)

    class Around:
        """peft's model, as distance.Peft wants it."""

        def __call__(self, **batch):
            return model(**batch)

        parameters, named_modules, modules = model.parameters, model.named_modules, model.modules

    beside = distance.Peft(Around())
    for strength in (1.0, 0.1):
        torch.testing.assert_close(path.logits(prompts[0], strength), beside.logits(prompts[0], strength), atol=1e-3, rtol=1e-4)
    ours, theirs = [*path.updates()], [*beside.updates()]
    assert [name.removeprefix("base_model.model.") for name, *_ in ours] == [name for name, *_ in theirs]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one[1:3], other[1:3])
        assert one[3] == other[3]
    without = model_of(architecture, False)
    torch.testing.assert_close(path.logits(prompts[0], 0.0), without(torch.tensor([prompts[0]])).logits[0], atol=1e-3, rtol=1e-4)


def test_beside_a_base_in_bf16_an_adapter_is_rounded_or_exact(prompts):
    """Against the same adapter in fp32 beside the bf16 weights, computed in fp32: the exact path has the smaller error."""
    right = model_of("Llama", True, torch.bfloat16).float()
    errors = {}
    for exact in (False, True):
        engine = Graphs(model_of("Llama", True, torch.bfloat16), 4, 100, exact=exact)
        kept = [a for _, a, _, _ in engine.decoder.updates()]
        wanted = [m.lora_A["default"].weight for _, m, *_ in engine.decoder._places()]
        errors[exact] = max((one - other).abs().max().item() for one, other in zip(kept, wanted, strict=True))
        gap = engine.logits(prompts[0]) - right(torch.tensor([prompts[0]])).logits[0]
        assert gap.abs().mean() < 0.5 * right(torch.tensor([prompts[0]])).logits[0].std()
    assert errors[True] == 0 < errors[False] < 0.01


def test_a_base_in_4_bit_is_dequantised_into_what_its_own_forward_pass_multiplies_with(tmp_path, prompts):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model_of("Qwen2", False).save_pretrained(tmp_path)
    quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quant, device_map={"": "cpu"}, dtype=torch.float32
    ).eval()
    loading.keep_trainable_on_cpu(model)  # as for each model that the pipeline loads
    with torch.no_grad():
        wanted = model(torch.tensor([prompts[0]])).logits[0]
    torch.testing.assert_close(Graphs(model, 4, 100).logits(prompts[0]), wanted, atol=1e-3, rtol=1e-4)


def test_what_it_does_not_know_is_answered_by_generate_and_said(capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50))
    made = generator.of(model, None, {"backend": "graphs", "adapter": "match"}, 8, 20)
    assert isinstance(made, generator.InBatches) and made.size == generator.FALLBACK
    assert "in place of `graphs`: GPT2LMHeadModel is none of LlamaForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}, "it attends in sliding windows"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "its rotary embedding is dynamic"),
    ],
)
def test_what_of_a_known_architecture_it_can_not_do(change, reason):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
    }
    assert decoder.unsupported(Qwen2ForCausalLM(Qwen2Config(vocab_size=50, **shape, **change))) == reason


def test_graphs_that_share_memory_keep_it_alive_when_room_is_made_for_longer_answers(prompts):
    """CUDA frees what graphs share with the last of them; to capture a new one into it then fails. (On a GPU: tests/gpu.)"""
    engine = Graphs(model_of("Llama", False), 4, 128)
    shared = engine.pool = object()
    engine.captured = {"prefill": "graph", ("decode",): "graph"}
    engine._prepare(Asked(ENDS, 40))
    assert engine.captured == {"prefill": "graph"} and engine.pool is shared
    engine.captured = {("decode",): "graph"}
    engine._prepare(Asked(ENDS, 60))
    assert not engine.captured and engine.pool is None
