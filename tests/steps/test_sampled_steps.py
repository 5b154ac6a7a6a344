"""The two steps behind a slice that a run makes: answers that a kill does not change, and the choice among them."""

import json
import shutil

import pytest

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.own_code import read as own_code
from workflow_scripts.plumbing.jsonl import read_jsonl
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.rl import placebos
from workflow_scripts.steps import choose_rows, generate, sample

pytestmark = pytest.mark.slow
GRAPHS, HF = {"backend": "graphs", "adapter": "match"}, {"backend": "hf", "batch_size": 5}
DATA = {"max_drop": 0.05, "max_prompt_tokens": 96, "decontaminate": {"rule": "whole_prompt", "ngram": 8, "share": 0.5}}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def prompts(folder):
    return small_steps.instructions_slice(folder / "data", 24)


def asking(out, base, prompts, seed: int = 1, generation: dict = GRAPHS, rows: int = 20, **more) -> manifests.Job:
    asked = {"n": 4, "temperature": 1.0, "max_new_tokens": 32} | more
    config = {"rows": rows, "seed": 1, "source": {"sampled": asked}, "generation": generation}
    return small_steps.job("sample", out / "best.answers.manifest.json", {"start": base, "prompts": prompts}, config, seed)


@pytest.fixture(scope="module")
def answers(folder, speaking_base, prompts):
    return small_steps.run(asking(folder / "asked", speaking_base, prompts)).path


def choice(out, base, prompts, answers, how: dict, kind: str = "sft", heldout: int = 3, **more) -> manifests.Job:
    config = {"kind": kind, "heldout": heldout, "source": {"sampled": how}, "reward": {"ifeval": 1.0}} | DATA | more
    return small_steps.job(
        "choose_rows", out / "best.manifest.json", {"base": base, "prompts": prompts, "answers": answers}, config
    )


# -- the answers --------------------------------------------------------------------------------------------------------------


def test_answers_are_drawn_from_streams_of_their_own(speaking_base, prompts, answers, tmp_path):
    made = manifests.read(answers)
    rows = made.rows()
    texts = [one["response"] for row in rows for one in row["answers"]]
    assert len(rows) == 20 and len(texts) == 80 == made.data["answers"]["sampled"] and len(set(texts)) > 60
    assert made.data["answers"]["tokens"] == sum(one["tokens"] for row in rows for one in row["answers"])
    asked = {row["id"]: row["prompt"] for row in manifests.read(prompts).rows()}
    assert all(row["prompt"] == asked[row["id"]] for row in rows)
    one_slot = asking(tmp_path / "slots", speaking_base, prompts)
    one_slot.slots = 3
    assert small_steps.run(one_slot).rows() == rows  # whatever is drawn beside it
    other = small_steps.run(asking(tmp_path / "seed", speaking_base, prompts, seed=2)).rows()
    assert [row["id"] for row in other] == [row["id"] for row in rows]
    assert sum(a["answers"] == b["answers"] for a, b in zip(other, rows, strict=True)) == 0


def test_the_other_backend_draws_the_same(speaking_base, prompts, answers, tmp_path):
    """Its products differ by rounding, and so may a draw here and there."""
    made = small_steps.run(asking(tmp_path, speaking_base, prompts, generation=HF))
    pairs = [(a, b) for one, other in zip(made.rows(), manifests.read(answers).rows(), strict=True)
             for a, b in zip(one["answers"], other["answers"], strict=True)]  # fmt: skip
    assert made.data["answered_by"] == "hf, 5 at a time" and sum(a == b for a, b in pairs) >= 0.95 * len(pairs)


@pytest.mark.parametrize("generation", [GRAPHS, HF], ids=["graphs", "hf"])
def test_a_killed_step_goes_on_and_ends_with_the_same_bytes(speaking_base, prompts, tmp_path, monkeypatch, capsys, generation):
    whole = small_steps.run(asking(tmp_path / "whole", speaking_base, prompts, generation=generation))
    job = asking(tmp_path / "killed", speaking_base, prompts, generation=generation)
    left, real, counts = [7, 1, 30, 52], open, []

    def dying(path, *args, **kwargs):
        if str(path).endswith("answers.jsonl") and args[:1] == ("a",):
            left[0] -= 1
            if left[0] < 0:
                with real(path, "a") as file:
                    file.write('{"row": 3, "answ')  # cut off in the middle of a line
                raise Killed
        return real(path, *args, **kwargs)

    while len(left) > 1:
        monkeypatch.setattr(generate, "open", dying, raising=False)
        with pytest.raises(Killed):
            small_steps.run(job)
        left.pop(0)
        counts.append(len(generate.read_answers(next(job.work.glob("*/answers.jsonl")))))
    monkeypatch.undo()
    assert counts == sorted(counts) and 0 < counts[-1] < 80
    resumed = small_steps.run(job)
    assert "were answered before: taken over" in capsys.readouterr().out
    assert resumed.data["files"]["best.answers.jsonl"] == whole.data["files"]["best.answers.jsonl"]


def test_three_shards_give_the_bytes_of_one_job(speaking_base, prompts, answers, tmp_path):
    whole = manifests.read(answers)
    job = asking(tmp_path / "all", speaking_base, prompts)
    job.step["out"] = "wherever"
    parts = []
    for number in (1, 2, 3):
        part = asking(tmp_path / "best_shards", speaking_base, prompts)
        part.step |= {"out": "wherever", "shard": [number, 3]}
        part.out = tmp_path / f"best_shards/{number}of3.json"
        small_steps.run(part)
        parts.append(part.out)
    assert len(json.loads(parts[0].read_text())["answers"]) == 28  # 7 of 20 prompts
    job.inputs += parts
    assert small_steps.run(job).data["files"] == whole.data["files"]
    job.inputs.pop()
    with pytest.raises(InputError, match="24 of 80 answers are not in"):
        small_steps.run(job)


def test_prompts_are_asked_once_and_drawn_by_the_seed():
    rows = [{"id": i, "prompt": f"ask {i // 2}"} for i in range(40)]
    assert [row["id"] for row in sample.prompts_of(rows, 30, 1)] == list(range(0, 40, 2))  # the first of each
    one, other = ([row["id"] for row in sample.prompts_of(rows, 10, seed)] for seed in (1, 2))
    assert len(one) == len(set(one)) == 10 and one == sorted(one) and one != other
    assert len({sample.stream(a, b) for a in range(30) for b in range(30)}) == 900


# -- the choice -----------------------------------------------------------------------------------------------------------------


def share(row: dict, text: str) -> float:
    from workflow_scripts.evaluation import ifeval
    from workflow_scripts.rl import verifiers

    with ifeval.reference() as checkers:
        return verifiers.ifeval_share(checkers, row, text)


def test_the_best_answers_are_those_that_the_checkers_find_best(speaking_base, prompts, answers, tmp_path):
    made = small_steps.run(choice(tmp_path, speaking_base, prompts, answers, {"keep": "best", "least": 0.5}))
    given = {row["id"]: row["answers"] for row in manifests.read(answers).rows()}
    asked, rows = {row["id"]: row for row in manifests.read(prompts).rows()}, made.rows()
    assert 5 < len(rows) < 20 and sum(row["heldout"] for row in rows) == 3
    for row in rows:
        name, sample_ = row["id"].split("#")
        rewards = [share(asked[name], one["response"]) for one in given[name]]
        kept = given[name][int(sample_)]
        usable = [r for r, one in zip(rewards, given[name], strict=True) if one["finish_reason"] == "stop"]
        assert row["rewards"] == [round(max(usable), 6)] and row["messages"][-1]["content"] == kept["response"]
        assert row["messages"][0]["content"] == asked[name]["prompt"] and max(usable) >= 0.5
    left = made.data["prompts"]["without_rows"]
    assert made.data["prompts"]["asked"] == 20 == len(rows) + sum(left.values()) and set(left) == {
        "with no answer at or above 0.5"
    }
    ranks = made.data["reward"]["by_rank"]
    assert len(ranks) == 4 and ranks == sorted(ranks, reverse=True) and made.data["answers"]["given"] == 80
    assert sum(ranks) / 4 == pytest.approx(made.data["reward"]["means"]["ifeval"], abs=1e-5)


@pytest.mark.parametrize(
    "how, kind",
    [
        ({"keep": "all_right", "least": 0.5}, "sft"),
        ({"keep": "pairs", "pair": "best_worst"}, "preference"),
        ({"keep": "pairs", "pair": "all"}, "preference"),
        ({"keep": "pairs", "pair": "margin", "margin": 0.75}, "preference"),
        ({"keep": "labels", "least": 0.5}, "unpaired"),
    ],
)
def test_every_way_to_keep_gives_rows_that_its_methods_train_on(speaking_base, prompts, answers, tmp_path, how, kind):
    made = small_steps.run(choice(tmp_path, speaking_base, prompts, answers, how, kind, heldout=12))
    rows = made.rows()
    fields = {"sft": {"messages"}, "preference": {"prompt", "chosen", "rejected"}, "unpaired": {"prompt", "completion", "label"}}
    assert rows and all(fields[kind] <= set(row) for row in rows)
    sides = [{row["id"].split("#")[0] for row in made.rows(heldout)} for heldout in (False, True)]
    assert all(sides) and not sides[0] & sides[1]  # no prompt on both sides
    if kind == "preference":
        least = how.get("margin", 1e-9)
        assert all(row["rewards"][0] - row["rewards"][1] >= least for row in rows)
        assert set(made.data["kept"]) == {"reward", "tokens", "longer_is_chosen", "words_shared"}


def test_with_flipped_labels_the_worst_answer_is_kept(speaking_base, prompts, answers, tmp_path):
    how = {"keep": "pairs", "pair": "best_worst"}
    right = small_steps.run(choice(tmp_path / "right", speaking_base, prompts, answers, how, "preference"))
    wrong = small_steps.run(
        choice(tmp_path / "wrong", speaking_base, prompts, answers, how | {"flip_labels": True}, "preference")
    )
    asked = {row["id"]: row for row in manifests.read(prompts).rows()}

    def gains(made):
        return [
            share(asked[row["id"].split("#")[0]], row["chosen"][0]["content"])
            - share(asked[row["id"].split("#")[0]], row["rejected"][0]["content"])
            for row in made.rows()
        ]

    assert min(gains(right)) > 0 > max(gains(wrong)) and len(gains(right)) == len(gains(wrong))


def test_with_flipped_labels_a_threshold_is_turned_round_too(speaking_base, prompts, answers, tmp_path):
    how = {"keep": "labels", "least": 0.75}
    right = small_steps.run(choice(tmp_path / "right", speaking_base, prompts, answers, how, "unpaired", heldout=12))
    wrong = small_steps.run(
        choice(tmp_path / "wrong", speaking_base, prompts, answers, how | {"flip_labels": True}, "unpaired", 12)
    )
    assert [row["label"] for row in wrong.rows()] == [not row["label"] for row in right.rows()]
    assert len({row["label"] for row in right.rows()}) == 2


OWN = """
def brief(prompts, completions, completion_ids, id, instruction_id_list, trainer_state, log_extra, log_metric, **columns):
    assert len(prompts) == len(completions) == len(completion_ids) == len(id) == len(instruction_id_list)
    return [-float(len(ids)) for ids in completion_ids]
"""


def test_a_reward_of_the_users_own_and_a_mixture_decide(speaking_base, prompts, answers, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    job = choice(
        tmp_path, speaking_base, prompts, answers, {"keep": "best"},
        reward={"brief": 0.01, "ifeval": 1.0}, rewards={"brief": {"file": "own.py", "function": "brief"}},
    )  # fmt: skip
    job.step["external"] = {"rewards": {"brief": own_code(tmp_path / "own.py").logic}}
    job.inputs.append(tmp_path / "own.py")
    made = small_steps.run(job)
    assert set(made.data["reward"]["means"]) == {"brief", "ifeval"}
    (tmp_path / "own.py").write_text(OWN.replace("-float", "float"))
    with pytest.raises(InputError, match="own.py: it, or what it imports, changed since this step was planned"):
        small_steps.run(job)


def test_a_reward_model_decides_as_it_judges_and_must_be_better_than_chance(speaking_base, prompts, pairs, answers, tmp_path):
    from workflow_scripts.rl import reward_model

    rm = small_steps.train(tmp_path / "rm", "rm", speaking_base, pairs, max_steps=1)
    job = choice(
        tmp_path, speaking_base, prompts, answers, {"keep": "best"}, reward={"rm": 1.0}, require_reward_above_chance=False
    )
    job.step["parents"] |= {"reward rm": rm.fingerprint, "start of rm": manifests.read(speaking_base).fingerprint}
    job.inputs.append(rm.path)
    rows = small_steps.run(job).rows()
    model, tokenizer = reward_model.load(manifests.read(speaking_base), rm, tmp_path / "w", "cpu", "fp32", small_steps.QUANT)
    judged = reward_model.score(model, tokenizer, [row["messages"] for row in rows], 16, 128)
    assert [row["rewards"][0] for row in rows] == pytest.approx(judged, abs=1e-3) and len(rows) == 20
    job.step["config"]["require_reward_above_chance"] = True
    with pytest.raises(InputError, match="not above chance, so its rewards mean nothing"):
        small_steps.run(job)


def test_a_coin_chooses_the_same_again_and_another_with_another_seed(speaking_base, prompts, answers, tmp_path):
    def coin(name: str, seed: int) -> list[dict]:
        job = choice(tmp_path / name, speaking_base, prompts, answers, {"keep": "best"}, reward={}, placebo="random")
        job.step["seed"] = seed
        return [row["messages"] for row in small_steps.run(job).rows()]

    assert coin("a", 1) == coin("b", 1) != coin("c", 2)


@pytest.mark.parametrize("at_once", [6, 3])
def test_a_reward_sees_all_answers_to_a_prompt_together(speaking_base, prompts, answers, tmp_path, monkeypatch, at_once):
    """Batches end between prompts: else the coins of a prompt's last answers would be those of its first."""
    seen = []

    def coins(seed):
        def judge(id, **columns):
            seen.append(id)
            return [0.0] * len(id)

        return judge

    monkeypatch.setattr(placebos, "coins", coins)
    monkeypatch.setattr(choose_rows, "AT_ONCE", at_once)
    small_steps.run(choice(tmp_path, speaking_base, prompts, answers, {"keep": "best"}, reward={}, placebo="random"))
    assert [(len(ids), len(set(ids))) for ids in seen] == [(4, 1)] * 20


def test_thoughts_are_left_out_where_the_evaluation_leaves_them_out(speaking_base, prompts, answers, tmp_path):
    rows = manifests.read(answers).rows()
    for row in rows:
        row["answers"] = [{**one, "response": f"<think>a, b, c</think>{one['response']}"} for one in row["answers"]]
    path = tmp_path / "thoughts.answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = small_steps.write_manifest(
        path.with_suffix("").with_suffix(".answers.manifest.json"), "samples", "thoughts", [path.name]
    )
    plain = small_steps.run(choice(tmp_path / "plain", speaking_base, prompts, answers, {"keep": "best"}))
    stripped = small_steps.run(choice(tmp_path / "bare", speaking_base, prompts, given, {"keep": "best"}, strip_think=["ifeval"]))
    assert stripped.data["reward"]["by_rank"] == plain.data["reward"]["by_rank"]
    kept = small_steps.run(choice(tmp_path / "kept", speaking_base, prompts, given, {"keep": "best"}))
    assert kept.data["reward"]["by_rank"] != plain.data["reward"]["by_rank"]


def test_what_is_dropped_and_what_is_left_is_said(speaking_base, prompts, answers, tmp_path):
    rows = manifests.read(prompts).rows()
    path = small_steps.write_slice(tmp_path / "eval", "ifeval", [{**row, "key": i} for i, row in enumerate(rows[:3])], heldout=0)
    job = choice(tmp_path, speaking_base, prompts, answers, {"keep": "best"}, max_drop=0.5)
    job.step["parents"]["ifeval_prompts"] = manifests.read(path).fingerprint
    job.inputs.append(path)
    made = small_steps.run(job)
    assert made.data["dropped"] == {"covering an evaluation prompt": 3} and made.data["rows"]["kept"] == 17
    job.step["config"]["max_drop"] = 0.1
    with pytest.raises(InputError, match=r"3 of 20 rows \(15.0%\) can't be used: 3 covering an evaluation prompt. The limit is"):
        small_steps.run(job)
    job = choice(tmp_path, speaking_base, prompts, answers, {"keep": "best", "least": 2.0})
    with pytest.raises(InputError, match="none of 80 answers to 20 prompts is kept: 20 prompts with no answer at or above 2"):
        small_steps.run(job)


def test_rows_that_are_too_long_for_who_trains_on_them_are_said_before_any_training(speaking_base, prompts, answers, tmp_path):
    job = choice(tmp_path, speaking_base, prompts, answers, {"keep": "pairs", "pair": "all"}, "preference")
    job.limits = {"best": [{"max_length": 9, "max_left_out": 0.2, "place": "best.jsonl", "user": "dpo_onpolicy"}]}
    with pytest.raises(InputError, match=r"best.jsonl: .*max_length \(9 tokens\).* for dpo_onpolicy"):
        small_steps.run(job)


def test_a_choice_that_was_killed_gives_the_same_bytes(speaking_base, prompts, answers, tmp_path, monkeypatch):
    whole = small_steps.run(choice(tmp_path / "whole", speaking_base, prompts, answers, {"keep": "best"}))
    job = choice(tmp_path / "killed", speaking_base, prompts, answers, {"keep": "best"})
    monkeypatch.setattr(manifests.work, "publish", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        small_steps.run(job)
    monkeypatch.undo()
    assert not job.out.exists()
    made = small_steps.run(job)
    assert made.data["files"] == whole.data["files"] and read_jsonl(made.folder / "best.jsonl") == whole.rows()
    shutil.rmtree(job.work)
