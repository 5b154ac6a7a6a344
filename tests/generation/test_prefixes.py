"""What prompts have in common is computed once (generation/prefixes.py), and their answers are still those of `generate`."""

import random

import pytest

from tests.generation.conftest import ENDS, greedy, model_of, parted
from workflow_scripts.generation import prefixes
from workflow_scripts.generation.answers import Asked
from workflow_scripts.generation.graphs import Graphs
from workflow_scripts.generation.prefixes import Entry, Prefixes, beginnings

NEW = 12
LENGTH = 280
SHARED = (5, 63, 64, 65, 100, 128, 129, 190)  # tokens that a prompt has in common with the longest one


def drawn(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(10, 300) for _ in range(count)]


@pytest.fixture(scope="module")
def alike() -> list[list[int]]:
    """Prompts of two tasks' worth of beginnings, shared to different lengths; one twice, one that is a beginning of another."""
    draw = random.Random(5)
    found = []
    for whole in (drawn(draw, 200), drawn(draw, 140)):
        found += [whole + drawn(draw, 20)]
        found += [whole[:count] + drawn(draw, draw.randint(1, 40)) for count in SHARED for _ in range(2)]
        found += [found[-1], whole[:97], whole[:64], whole[:1]]
    draw.shuffle(found)
    return found


@pytest.fixture(scope="module")
def theirs(alike):
    model = model_of("Qwen2", True)
    return [greedy(model, prompt, NEW) for prompt in alike]


def answers(engine, prompts, asked):
    found = {}
    engine.answer([*enumerate(prompts)], asked, lambda place, sample, made: found.__setitem__((place, sample), made.tokens))
    return found


def wrong(prompts, theirs, slots=9, engine=None, model=None) -> list[int]:
    model = model or model_of("Qwen2", True)
    made = answers(engine or Graphs(model, slots, LENGTH), prompts, Asked(ENDS, NEW))
    return [i for i, one in enumerate(theirs) if parted(model, prompts[i], made[i, 0], one)]


@pytest.fixture
def computed(monkeypatch):
    """How many rows went through the model to fill slots."""
    rows = []
    right = Graphs._through
    monkeypatch.setattr(Graphs, "_through", lambda self, part: rows.extend(part) or right(self, part))
    return rows


@pytest.mark.parametrize("slots", [1, 4, 60])
def test_prompts_that_begin_alike_are_answered_as_by_generate(slots, alike, theirs, computed):
    assert not wrong(alike, theirs, slots)
    assert len(computed) < (1 if slots == 1 else 0.6) * sum(map(len, alike))


def test_with_and_without_sharing_answers_are_the_same(alike, computed, monkeypatch):
    model, asked = model_of("Qwen2", True), Asked(ENDS, NEW, temperature=1.0, samples=3, seed=2)
    made = answers(Graphs(model, 20, LENGTH), alike, asked)
    with_sharing = len(computed)
    monkeypatch.setattr(prefixes, "beginnings", lambda ids: [])
    assert answers(Graphs(model, 20, LENGTH), alike, asked) == made
    without = len(computed) - with_sharing
    assert without == 3 * sum(len(ids) - 1 for ids in alike) and with_sharing < 0.3 * without


def test_what_a_kill_has_left_is_answered_as_it_would_have_been(alike, theirs):
    model = model_of("Qwen2", True)
    for left in (range(3, len(alike), 5), range(len(alike) - 1, 0, -3)):
        found = {}
        asked = [(place, alike[place]) for place in left]
        Graphs(model, 9, LENGTH).answer(
            asked, Asked(ENDS, NEW), lambda i, _, made, found=found: found.__setitem__(i, made.tokens)
        )
        assert not [i for i in left if parted(model, alike[i], found[i], theirs[i])]


def one_more(right):
    def longest(self, ids, keys):
        slot, count = right(self, ids, keys)
        return slot, min(count + 1, len(ids) - 1) if count else 0

    return longest


FAULTS = {
    "a prefix that is too long": lambda m: m.setattr(Prefixes, "_longest", one_more(Prefixes._longest)),
    "a prefix that is not copied": lambda m: m.setattr(Graphs, "_copy", lambda self, slot, to, length: None),
    "a slot that has another prompt by now": lambda m: (
        m.setattr(Prefixes, "_drop", lambda self, slot: None),
        m.setattr(Prefixes, "_put", first_of_all(Prefixes._put)),
    ),
    "a source that is not computed yet": lambda m: m.setattr(Prefixes, "waves", at_once(Prefixes.waves)),
}


def first_of_all(right):
    return lambda self, slot, ids, keys: right(self, slot, *self.held.get(slot, (ids, keys)))


def at_once(right):
    return lambda self, entering: iter([[entry for wave in right(self, entering) for entry in wave]][::-1])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, alike, theirs, monkeypatch):
    FAULTS[fault](monkeypatch)
    assert wrong(alike, theirs, slots=4)


@pytest.mark.parametrize("fault", [False, True])
def test_what_another_adapter_left_in_the_slots_is_not_taken(fault, alike, monkeypatch):
    """The second call is another task, or the next rollout of a training. Fault: what the first one left is remembered."""
    if fault:
        monkeypatch.setattr(Prefixes, "forget", lambda self: None)
    model = model_of("Qwen2", True)
    engine = Graphs(model, 30, LENGTH)
    answers(engine, alike, Asked(ENDS, NEW))
    for _, module, *_ in engine.decoder._places():
        module.lora_B["default"].weight.data *= -2
    engine.load()
    again = alike[:12]
    assert bool(wrong(again, [greedy(model, one, NEW) for one in again], engine=engine, model=model)) == fault


def test_hashes_that_collide_change_no_answer(alike, theirs, monkeypatch):
    monkeypatch.setattr(prefixes, "beginnings", lambda ids: [(count, 1) for count, _ in beginnings(ids)])
    assert not wrong(alike, theirs)


def test_a_long_prefix_is_computed_once_and_a_prompt_s_samples_share_its_prefill_in_later_rounds_too(computed):
    draw = random.Random(7)
    examples = drawn(draw, 200)
    prompts = [examples + drawn(draw, 20) for _ in range(12)]
    engine = Graphs(model_of("Llama", False), 5, LENGTH)
    answers(engine, prompts, Asked((), 8))
    # Where all end at once, the first of those that enter computes it again. The last two find it in the three other slots.
    assert len(computed) == 2 * 200 + 12 * 19
    computed.clear()
    answers(engine, prompts[:1], Asked((), 8, temperature=1.0, samples=5))
    assert len(computed) == 219


def test_waves():
    made, long = Prefixes(), [*range(300)]
    entering = [(0, long), (1, long[:200] + [7, 7]), (2, long[:200] + [8, 7]), (3, [5]), (4, long[:100]), (5, long)]
    first, second = made.waves(entering)
    assert first == [Entry(0, long, -1, 0), Entry(3, [5], -1, 0)]
    assert second == [Entry(1, entering[1][1], 0, 200), Entry(2, entering[2][1], 0, 200), Entry(4, long[:100], 0, 99),
                      Entry(5, long, 0, 299)]  # fmt: skip
    (again,) = made.waves([(0, [9] * 70), (1, long[:130] + [9] * 80)])
    assert again == [Entry(0, [9] * 70, -1, 0), Entry(1, entering[1][1][:130] + [9] * 80, 2, 130)]
    made.moved(5, 0)
    (after,) = made.waves([(5, long[:299] + [0, 0])])
    assert after == [Entry(5, long[:299] + [0, 0], 0, 299)]
    made.forget()
    assert [*made.waves([(5, long)])] == [[Entry(5, long, -1, 0)]]
