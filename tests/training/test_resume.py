"""A training that was ended or killed goes on where it was, and gives the same adapter, curves and objective bit for bit."""

import json
import os
import shutil
import signal

import pytest

from tests.support import small_steps
from tests.support.right_way import sample
from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.fingerprint import fingerprint
from workflow_scripts.plumbing.messages import InputError, Interrupted
from workflow_scripts.training import checkpoints

METHODS = {
    "sft_v2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 3},
    "dpo": {"per_device_train_batch_size": 4, "logging_steps": 3},
    "simpo": {"per_device_train_batch_size": 4, "logging_steps": 3},
    "kto": {"per_device_train_batch_size": 8, "logging_steps": 3},
    "rm": {"per_device_train_batch_size": 4, "logging_steps": 3},
    "ppo_ifeval": {"max_steps": 8, "per_device_train_batch_size": 4, "steps_per_generation": 1, "max_completion_length": 12},
    "grpo": {"max_steps": 5, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12},
    "rloo": {"max_steps": 5, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12},
}


def step_of(method, base, slices, out, **more):
    config = small_steps.train_config(method, **METHODS[method], **more)
    parents = {"start": base, "rows": slices[method]}
    return small_steps.job(f"train_{config['method']}", out / "adapter" / "manifest.json", parents, config)


def end_at(step: int, monkeypatch, by=lambda: os.kill(os.getpid(), signal.SIGTERM)):
    """From now on each training is asked to end while it makes this step."""
    before = checkpoints.Checkpoints.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            by()
        before(self, args, state, control, **kwargs)

    monkeypatch.setattr(checkpoints.Checkpoints, "on_step_end", on_step_end)


def outcome(adapter: manifests.Artifact) -> tuple:
    weights = adapter.data["files"]["adapter_model.safetensors"]
    return weights, adapter.data["objective"], (adapter.folder / "metrics.csv").read_text()


@pytest.mark.parametrize("method", sample("sft_v2", "ppo_ifeval", "grpo", "simpo", "dpo", "kto", "rm", "rloo", n=4))
def test_ended_by_sigterm_twice_and_resumed_is_as_if_never_ended(method, base, slices, tmp_path, capsys):
    job, handler = step_of(method, base, slices, tmp_path / "run"), signal.getsignal(signal.SIGTERM)
    saved = (2, 4) if method == "ppo_ifeval" else (1, 3)  # two epochs on each rollout: saved where the second ends
    for asked, step in zip((1, 3), saved, strict=True):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match=f"at step {step} of .* checkpoint"):
            end_at(asked, patch)
            small_steps.run(job)
        assert not job.out.exists()
    resumed = small_steps.run(job)
    assert f"resumed at step {saved[1]} of" in capsys.readouterr().out
    shutil.rmtree(job.work)
    shutil.rmtree(job.out.parent)
    assert outcome(small_steps.run(job)) == outcome(resumed)
    assert "resumed" not in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.fixture
def in_front():
    """As a command on a terminal hears Ctrl-C; one that a shell has in the background ignores it, and so does what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_as_sigterm_does_and_a_second_one_ends_at_once(in_front, base, slices, tmp_path, capsys):
    job = step_of("dpo", base, slices, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="ended by Ctrl-C at step 2 of .* run snakemake"):
        end_at(2, patch, by=lambda: os.kill(os.getpid(), signal.SIGINT))
        small_steps.run(job)
    assert "Ctrl-C: saving at the next step" in capsys.readouterr().out and signal.getsignal(signal.SIGINT) == in_front

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        end_at(3, patch, by=twice)
        small_steps.run(job)
    small_steps.run(job)
    assert "resumed at step 2 of" in capsys.readouterr().out


def test_rollouts_that_are_used_twice_are_saved_only_where_they_end(base, slices, tmp_path):
    job = step_of("grpo", base, slices, tmp_path / "run", num_iterations=2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="at step 4 of 5"):
        end_at(3, patch)
        small_steps.run(job)
    resumed = small_steps.run(job)
    shutil.rmtree(job.work)
    shutil.rmtree(job.out.parent)
    assert outcome(small_steps.run(job)) == outcome(resumed)


@pytest.fixture(scope="module")
def undisturbed(folder):
    """undisturbed(job): the outcome of a training that nothing ends; of equal steps it is made once."""
    found = {}

    def made(job: manifests.Job) -> tuple:
        mark = fingerprint(job.step)
        if mark not in found:
            place = folder / mark
            one = manifests.Job(job.step, job.inputs, place / "adapter/manifest.json", place / ".work")
            found[mark] = outcome(small_steps.run(one))
        return found[mark]

    return made


class Killed(Exception):
    pass


def kill():
    raise Killed


@pytest.mark.parametrize("where", sample("rollout", "policy update", "value update", n=2))
def test_ppo_killed_in_a_rollout_or_in_an_update_goes_on_from_the_rollout_before(
    base, slices, tmp_path, capsys, where, undisturbed
):
    """With a coefficient that is steered, which the checkpoint has to carry; the value's head and optimiser state as well."""
    from workflow_scripts.rl import advantages
    from workflow_scripts.rl.ppo_trainer import PPOTrainer

    steered = small_steps.CONFIG.experiments["ppo"]["ppo"] | {"kl_target": 0.5}
    job = step_of("ppo_ifeval", base, slices, tmp_path / "run", ppo=steered)
    job.checkpoint_minutes = 1e-9
    calls = []

    def at_call(number, real):
        def called(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                kill()
            return real(*args, **kwargs)

        return called

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        if where == "rollout":
            patch.setattr(PPOTrainer, "_add_targets", at_call(3, PPOTrainer._add_targets))
        elif where == "policy update":
            patch.setattr(PPOTrainer, "training_step", at_call(6, PPOTrainer.training_step))
        else:
            patch.setattr(advantages, "value_loss", at_call(6, advantages.value_loss))
        small_steps.run(job)
    (folder,) = job.work.glob("*/trainer")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert json.loads((folder / "checkpoint-4/ppo.json").read_text())["kl_coef"] != steered["kl_coef"]
    resumed = small_steps.run(job)
    assert "resumed at step 4 of 8" in capsys.readouterr().out
    assert outcome(resumed) == undisturbed(job)


@pytest.fixture
def killed(base, slices, tmp_path):
    """An SFT that saved after each step and died in its fourth."""
    job = step_of("sft_v2", base, slices, tmp_path / "run", num_train_epochs=2)
    job.checkpoint_minutes = 1e-9
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        end_at(4, patch, by=kill)
        small_steps.run(job)
    (folder,) = job.work.glob("*/trainer")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    return job, folder


def test_a_killed_training_goes_on_from_its_last_checkpoint(killed, capsys, undisturbed):
    job, _ = killed
    resumed = small_steps.run(job)
    assert "resumed at step 3 of" in capsys.readouterr().out
    assert outcome(resumed) == undisturbed(job)


def test_a_checkpoint_that_a_kill_left_half_written_is_passed_over(killed, capsys, undisturbed):
    job, folder = killed
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-4")
    (folder / "checkpoint-4" / checkpoints.SEAL).unlink()
    resumed = small_steps.run(job)
    printed = capsys.readouterr().out
    assert "checkpoint-4: half written, passed over" in printed and "resumed at step 3" in printed
    assert outcome(resumed) == undisturbed(job)


def test_a_damaged_checkpoint_is_passed_over_and_training_starts_again(killed, capsys, undisturbed):
    job, folder = killed
    weights = folder / "checkpoint-3/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    again = small_steps.run(job)
    printed = capsys.readouterr().out
    assert "checkpoint-3: damaged" in printed and "resumed" not in printed
    assert outcome(again) == undisturbed(job)


def test_a_checkpoint_of_another_step_is_refused_with_the_remedy(killed):
    job, folder = killed
    seal = folder / "checkpoint-3" / checkpoints.SEAL
    seal.write_text(json.dumps(json.loads(seal.read_text()) | {"fingerprint": "0" * 32}))
    with pytest.raises(InputError, match=r"checkpoint-3: a checkpoint of another step .*; remove the folder .*/trainer and run"):
        small_steps.run(job)
    shutil.rmtree(folder)
    small_steps.run(job)


def test_answers_that_a_killed_run_gave_are_taken_over_and_a_cut_off_line_is_made_again(
    base, folder, tmp_path, capsys, monkeypatch
):
    from workflow_scripts.steps import generate
    from workflow_scripts.tiny import world

    prompts = folder / "data/prompts.jsonl"
    prompts.parent.mkdir(exist_ok=True)
    prompts.write_text("".join(json.dumps(row) + "\n" for row in world.eval_rows(20, seed=1)))
    manifest = small_steps.write_manifest(prompts.with_suffix(".manifest.json"), "slice", "prompts", ["prompts.jsonl"])
    parents = {"start": base, "prompts": manifest}
    job = small_steps.job(
        "generate",
        tmp_path / "run/ifeval_responses.manifest.json",
        parents,
        small_steps.answering(8),
    )
    monkeypatch.setattr(manifests, "complete", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        small_steps.run(job)
    monkeypatch.undo()
    (saved,) = job.work.glob("*/answers.jsonl")
    lines = saved.read_text().splitlines(keepends=True)
    assert len(lines) == 20
    saved.write_text("".join(lines[:12]) + lines[12][:30])
    resumed = small_steps.run(job)
    assert "12 prompts were answered before: taken over" in capsys.readouterr().out
    kept = saved.read_text().splitlines(keepends=True)
    assert kept[:12] == lines[:12] and sorted(kept) == sorted(lines)
    shutil.rmtree(job.work)
    fresh = small_steps.run(job)
    assert fresh.data["files"] == resumed.data["files"]
    assert fresh.data["answered_by"] == "graphs"  # the manifest says who it was, also where `hf` stood in
    assert generate.read_answers(None) == {}
