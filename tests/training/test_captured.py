"""Fused and recorded layers compute what the plain ones do: on a CPU, in fp32, without CUDA's part (tests/gpu has that)."""

import pytest
import torch

from tests.support import small_steps
from tests.support.small_adapter import adapted, batch, put_back_at_the_end
from workflow_scripts.artifacts import manifests
from workflow_scripts.models import loading
from workflow_scripts.training import captured, fused, speed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_steps.write_base(tmp_path_factory.mktemp("captured") / "base", steps=5)


def result(model, given):
    """(logits of the real tokens, the gradients of all adapter weights)."""
    model.zero_grad()
    logits = model(**given).logits[given["attention_mask"].bool()]
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other):
    assert torch.allclose(one[0], other[0], atol=1e-5)
    assert one[1].keys() == other[1].keys() and len(one[1]) > 20
    for name, gradient in one[1].items():
        assert torch.allclose(gradient, other[1][name], atol=1e-6, rtol=1e-4), name


def test_a_layer_with_its_adapter_as_one_function_has_pefts_output_and_gradients(base):
    model = adapted(base)
    plain = result(model, batch())
    assert fused.fuse(model) == 7 * model.config.num_hidden_layers
    seen = []
    real = fused.Beside.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused.Beside, "forward", staticmethod(lambda *args: (seen.append(1), real(*args))[1]))
        made = result(model, batch())
    assert len(seen) == 7 * model.config.num_hidden_layers
    assert_same(plain, made)
    with model.disable_adapter():
        assert torch.equal(
            model(**batch()).logits, loading.load(manifests.read(base), base.parent, "cpu", "fp32")(**batch()).logits
        )


def test_the_gradients_of_the_function_are_those_of_its_output_with_dropout_too():
    torch.manual_seed(1)
    x, w = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, dtype=torch.float64)
    a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (4, 3)))

    def function(x, a, b, rate):
        torch.manual_seed(2)
        return fused.Beside.apply(x, w, None, a, b, 0.7, rate)

    for rate in (0.0, 0.4):
        assert torch.autograd.gradcheck(lambda *given, rate=rate: function(*given, rate), (x, a, b))
    torch.manual_seed(2)
    dropped = torch.native_dropout(x, 0.4, True)[0]
    assert 0 < (dropped == 0).sum() < dropped.numel()
    assert torch.allclose(function(x, a, b, 0.4), x @ w.T + 0.7 * (dropped @ a.T @ b.T))


def test_dropout_acts_in_training_alone(base):
    model = adapted(base, dropout=0.5)
    fused.fuse(model)
    model.train()
    assert not torch.equal(model(**batch()).logits, model(**batch()).logits)
    model.eval()
    assert torch.equal(model(**batch()).logits, model(**batch()).logits)


@pytest.fixture
def in_pieces(base, monkeypatch):
    """(A model by pieces that are not compiled, what was asked of them, its plain result)"""
    model = adapted(base)
    body = put_back_at_the_end(model, monkeypatch)
    asked, plain = [], result(model, batch())
    monkeypatch.setattr(torch, "compile", lambda piece, **how: lambda *given: (asked.append(piece.__name__), piece(*given))[1])
    assert fused.compile_pieces(body) >= 3 * model.config.num_hidden_layers
    return model, asked, plain


def test_the_pieces_between_the_products_are_the_models(base, in_pieces):
    model, asked, plain = in_pieces
    assert_same(plain, result(model, batch()))
    layers = model.config.num_hidden_layers
    assert (asked.count("gate"), asked.count("rotate")) == (layers, layers) and asked.count("norm") >= 2 * layers
    assert (asked.count("gate_back"), asked.count("rotate_back")) == (layers, layers) and asked.count("norm_back") >= 2 * layers
    with torch.no_grad():
        model(**batch())
    assert asked.count("gate") == 2 * layers and asked.count("gate_back") == layers  # with and without a gradient the same code


def test_the_derivatives_of_the_pieces_are_theirs():
    def given(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(1)
    x, g, u, q, k = given(3, 8), given(3, 8), given(3, 8), given(1, 4, 3, 8), given(1, 2, 3, 8)
    weight, cos, sin = (torch.randn(*shape, dtype=torch.float64) for shape in ((8,), (1, 3, 8), (1, 3, 8)))
    wide = torch.Tensor.float
    with pytest.MonkeyPatch.context() as patch:  # the pieces go by fp32, where gradcheck sees too little
        patch.setattr(torch.Tensor, "float", lambda tensor: tensor if tensor.dtype == torch.float64 else wide(tensor))
        check = torch.autograd.gradcheck
        assert check(lambda x: fused.Norm.apply(x, weight, 1e-6, (fused.norm, fused.norm_back)), x)
        assert check(lambda g, u: fused.Gate.apply(g, u, (fused.gate, fused.gate_back)), (g, u))
        assert check(lambda q, k: fused.Rotation.apply(q, k, cos, sin, (fused.rotate, fused.rotate_back)), (q, k))


def test_layers_over_a_row_of_few_sizes_compute_what_they_compute_over_the_batch(base):
    model = adapted(base)
    plain = result(model, batch())
    speed.Unpadded(model.get_base_model())
    rows = []
    layers = captured.Captured(model.get_base_model().base_model, record=False)
    real = layers.layers

    def noted(given, longest):
        rows.append([*(one.shape[1] for one in given[:3]), len(given[3])])
        return real(given, longest)

    layers.layers = noted
    assert_same(plain, result(model, batch()))
    assert rows == [[256, 256, 256, 9]]
    asked = {**batch(), "max_new_tokens": 4, "do_sample": False} | {"use_cache": True}
    one, other = (of.generate(**asked) for of in (model, adapted(base)))
    assert torch.equal(one, other)


@pytest.mark.parametrize("tokens, size", [(1, 256), (256, 256), (257, 512), (2049, 2304), (12_600, 13_312), (30_000, 30_720)])
def test_a_row_gets_one_of_few_sizes(tokens, size):
    assert captured.size_of(tokens) == size
    assert size - tokens < max(256, tokens / 8)


class Noted:
    """In place of a recording: plays the layers, and tells what was asked of it."""

    log: list

    def __init__(self, layers, given, longest, grads, pool, stream):
        self.layers, self.longest, self.grads = layers, longest, grads
        Noted.log.append(("recorded", given[0].shape[1], bool(grads)))

    def play(self, given):
        Noted.log.append(("played", given[0].shape[1], bool(self.grads)))
        self.given = given
        with torch.no_grad():
            return self.layers(given, self.longest).clone()

    def play_back(self, dout):
        Noted.log.append(("back", dout.shape[1], True))
        with torch.enable_grad():
            return list(torch.autograd.grad(self.layers(self.given, self.longest), self.grads, dout, allow_unused=True))


@pytest.fixture
def recorded(base, monkeypatch):
    model = adapted(base)
    speed.Unpadded(model.get_base_model())
    monkeypatch.setattr(captured, "Recording", Noted)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(captured.Arena, "possible", lambda arena, tokens: 1 << 40)
    monkeypatch.setattr(captured.Arena, "spare", lambda arena: 1 << 40)
    monkeypatch.setattr(captured.Arena, "renew", lambda arena, capacity: setattr(arena, "capacity", capacity))
    monkeypatch.setattr(captured.Arena, "release", lambda arena: setattr(arena, "capacity", 0))
    captured.Captured(model.get_base_model().base_model)
    Noted.log = []
    return model


def test_what_comes_up_often_is_recorded_and_its_gradients_are_the_plain_ones(base, recorded):
    plain = result(adapted(base), batch())
    for _ in range(4):
        assert_same(plain, result(recorded, batch()))
    once = [("played", 256, True), ("back", 256, True)]
    assert Noted.log == [("recorded", 256, True), *once, *once]


def test_another_adapter_state_or_moved_weights_are_recorded_anew(base, recorded):
    for _ in range(3):
        result(recorded, batch())
    with torch.no_grad():
        for _ in range(captured.OFTEN[False]):
            recorded(**batch())
        with recorded.disable_adapter():
            for _ in range(captured.OFTEN[False]):
                off = recorded(**batch()).logits
    kinds = [one for one in Noted.log if one[0] == "recorded"]
    assert kinds == [("recorded", 256, True), ("recorded", 256, False), ("recorded", 256, False)]
    plain, real = adapted(base), batch()["attention_mask"].bool()
    with torch.no_grad(), plain.disable_adapter():
        assert torch.allclose(plain(**batch()).logits[real], off[real], atol=1e-5)
    weight = recorded.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    weight.data = weight.data * 2
    Noted.log.clear()
    with torch.no_grad():
        recorded(**batch())
    assert Noted.log == []


def test_between_a_batch_and_its_gradient_no_other_is_played(base, recorded):
    for _ in range(3):
        result(recorded, batch())
    Noted.log.clear()
    first, second = (recorded(**batch()).logits.square().mean() for _ in range(2))
    assert Noted.log == [("played", 256, True)]  # the second ran as it is
    second.backward()
    first.backward()
    again = recorded(**batch()).logits
    assert [one[0] for one in Noted.log] == ["played", "back", "played"]
    del again
    recorded(**batch())
    assert [one[0] for one in Noted.log][-1] == "played" and len(Noted.log) == 4  # the one before was given up


def test_there_is_an_arena_where_there_is_room_beside_what_runs_as_it_is(monkeypatch):
    """Of a job that shares its card, that is its share; on a card for itself, what is free."""
    from workflow_scripts.plumbing import gpus

    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * gib, 140 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 30 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * gib)
    arena = captured.Arena()
    arena.each = 20 * gib / 10_000
    assert arena.spare() == 125 * gib and not arena.has_room(10_000)
    assert arena.possible(10_000) == arena.needed(12_500) == pytest.approx(31 * gib)
    assert arena.needed(24_000) < arena.possible(24_000) < arena.needed(30_000)  # less ahead than it would like
    assert not arena.possible(26_000)
    monkeypatch.setattr(gpus, "limit", lambda: 60 * gib)
    assert arena.spare() == 55 * gib and arena.possible(10_000) and not arena.possible(12_000)
    arena.capacity = 31 * gib  # which is given back first
    assert arena.spare() == 24 * gib and arena.possible(10_000) and arena.has_room(12_000) and not arena.has_room(13_000)


def test_the_arena_is_given_back_where_a_longer_batch_needs_the_memory(base, recorded, monkeypatch, capsys):
    spare = [1 << 40]
    monkeypatch.setattr(captured.Arena, "spare", lambda arena: spare[0])
    monkeypatch.setattr(captured.Arena, "needed", lambda arena, tokens: tokens)
    released = []
    monkeypatch.setattr(captured.Arena, "release", lambda arena: (released.append(1), setattr(arena, "capacity", 0)))
    for _ in range(3):
        result(recorded, batch())
    spare[0] = 300
    long = batch(([5] * 300, [7, 11]))
    plain = result(adapted(base), long)
    Noted.log.clear()
    for _ in range(4):
        assert_same(plain, result(recorded, long))
    assert Noted.log == [] and released == [1]
    assert capsys.readouterr().out.count("no batch is recorded any more") == 1


def test_what_runs_in_inference_mode_is_not_recorded(base, recorded):
    """Its tensors could not be written again outside of it."""
    with torch.inference_mode():
        for _ in range(2 * captured.OFTEN[False]):
            recorded(**batch())
    assert Noted.log == []


def test_a_size_without_room_runs_as_it_is_and_is_said_once(base, recorded, monkeypatch, capsys):
    monkeypatch.setattr(captured.Arena, "possible", lambda arena, tokens: 0)
    plain = result(adapted(base), batch())
    for _ in range(5):
        assert_same(plain, result(recorded, batch()))
    assert Noted.log == []
    assert capsys.readouterr().out.count("batches of 256 tokens run kernel by kernel") == 1


def test_a_recording_that_finds_no_room_after_all_is_given_up_and_said_once(base, recorded, monkeypatch, capsys):
    def full(*given):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(captured, "Recording", full)
    plain = result(adapted(base), batch())
    for _ in range(5):
        assert_same(plain, result(recorded, batch()))
    assert capsys.readouterr().out.count("batches of 256 tokens run kernel by kernel") == 1


def test_a_larger_size_renews_the_arena_and_what_lay_in_it_is_recorded_again(base, recorded, monkeypatch):
    monkeypatch.setattr(captured.Arena, "needed", lambda arena, tokens: tokens)
    monkeypatch.setattr(captured.Arena, "possible", lambda arena, tokens: tokens)
    long = batch(([5] * 300, [7, 11]))
    for _ in range(3):
        result(recorded, batch())
    for _ in range(3):
        result(recorded, long)
    plain = result(adapted(base), batch())
    assert_same(plain, result(recorded, batch()))
    result(recorded, long)
    assert [one[:2] for one in Noted.log if one[0] == "recorded"] == [("recorded", 256), ("recorded", 512), ("recorded", 256)]


def test_pieces_are_of_decoders_with_the_same_gate():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 90}
    assert fused.knows(LlamaForCausalLM(LlamaConfig(**small)).base_model)
    assert not fused.knows(LlamaForCausalLM(LlamaConfig(**small, hidden_act="gelu")).base_model)


def test_memory_that_is_set_aside_is_not_in_the_peak(monkeypatch):
    from workflow_scripts.plumbing import gpus

    now = [50]
    monkeypatch.setattr(gpus, "_earlier", 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: now.__setitem__(0, 10))
    monkeypatch.setattr(captured.Arena, "release", lambda arena: None)
    monkeypatch.setattr(captured.Arena, "reserve", lambda arena, capacity: now.__setitem__(0, 900))
    captured.Arena().renew(850)
    assert gpus.peak(now[0]) == 50
    assert gpus.peak(70) == 70


def test_after_a_recording_that_failed_none_from_before_it_is_played(base, recorded, monkeypatch):
    for _ in range(3):
        result(recorded, batch())

    def fails(*given):
        raise RuntimeError("not permitted while it is recorded")

    with monkeypatch.context() as within, torch.no_grad():
        within.setattr(captured, "Recording", fails)
        for _ in range(captured.OFTEN[False]):
            recorded(**batch())
    Noted.log.clear()
    assert_same(result(adapted(base), batch()), result(recorded, batch()))
    assert [one[0] for one in Noted.log] == ["recorded", "played", "back"]
