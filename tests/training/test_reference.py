"""The reference that is kept: the same numbers as TRL's own, found again where all is the same, and nowhere else."""

import pytest
import torch
from trl import DPOTrainer, KTOTrainer

from tests.support import small_steps
from workflow_scripts.training import reference

MORE = {"per_device_train_batch_size": 4, "logging_steps": 1, "max_steps": 3}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return small_steps.pairs_slice(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_steps.write_base(tmp_path_factory.mktemp("base") / "base", steps=20)


def training(experiment, place, base, pairs, seed=1, **more):
    config = small_steps.train_config(experiment, **MORE | more)
    out = place / "adapter/manifest.json"
    job = small_steps.job(f"train_{config['method']}", out, {"start": base, "rows": pairs}, config, seed)
    job.work = place.parent / ".work"  # as of one config: shared
    return job


def result(job):
    made = small_steps.run(job)
    return made.data["files"]["adapter_model.safetensors"], made.data["objective"], (made.folder / "metrics.csv").read_text()


@pytest.fixture
def passes(monkeypatch):
    """How many batches went through the model as a reference."""
    found = []
    for kind in (DPOTrainer, KTOTrainer):
        real = kind.compute_ref_log_probs
        monkeypatch.setattr(
            kind, "compute_ref_log_probs", lambda self, *args, real=real: found.append(type(self)) or real(self, *args)
        )
    return found


@pytest.mark.parametrize("experiment", ["dpo", "kto"])
def test_a_kept_reference_gives_the_same_adapter_bit_for_bit_and_no_pass(experiment, base, pairs, tmp_path, passes, capsys):
    alone = result(training(experiment, tmp_path / "alone/run", base, pairs))
    count = len(passes)
    assert count > 5
    first = result(training(experiment, tmp_path / "one/first", base, pairs))
    assert len(passes) == 2 * count and "taken over" not in capsys.readouterr().out
    again = result(training(experiment, tmp_path / "one/again", base, pairs))
    assert len(passes) == 2 * count and capsys.readouterr().out.count("taken over") == 2  # trained on, and held out
    assert first == again == alone


@pytest.mark.parametrize("experiment", ["dpo", "kto"])
def test_what_is_kept_is_what_trl_computes(experiment, base, pairs, tmp_path):
    trainer = small_steps.built_trainer(tmp_path, experiment, base, pairs, **MORE)
    kind = next(kind for kind in (DPOTrainer, KTOTrainer) if isinstance(trainer, kind))
    for name in ("train_dataset", "eval_dataset"):
        ours = getattr(trainer, name)
        columns = [column for column in trainer.COLUMNS if column in ours.column_names]
        assert len(columns) == 2
        size = trainer.args.per_device_train_batch_size if name[0] == "t" else trainer.args.per_device_eval_batch_size
        theirs = kind._precompute_ref_logps(trainer, ours.remove_columns(columns), name, size)
        for column in columns:
            assert torch.equal(torch.tensor(ours[column][:]), torch.tensor(theirs[column][:])), (name, column)
            assert ours.features[column] == theirs.features[column]


def test_variants_and_seeds_share_it_and_what_changes_a_number_does_not(base, pairs, tmp_path, passes):
    small_steps.run(training("dpo", tmp_path / "dpo", base, pairs))
    computed = len(passes)
    sharing = {"dpo_ipo": {}, "beta": {"beta": 0.3}, "seed": {"seed": 2}, "rate": {"learning_rate": 1e-4}}
    for place, more in sharing.items():
        name = "dpo_ipo" if place == "dpo_ipo" else "dpo"
        small_steps.run(training(name, tmp_path / place, base, pairs, **more))
        assert len(passes) == computed, place
    other = small_steps.write_base(tmp_path / "other base", seed=3, steps=5)
    fewer = small_steps.pairs_slice(tmp_path / "fewer", 39)
    apart = {"batch": {"per_device_train_batch_size": 5}, "nf4": {"quantise": "nf4"}, "base": {}, "rows": {}}
    for place, more in apart.items():
        before = len(passes)
        start, rows = (other if place == "base" else base), (fewer if place == "rows" else pairs)
        small_steps.run(training("dpo", tmp_path / place, start, rows, **more))
        assert len(passes) > before, place


def test_the_kl_rows_of_kto_are_found_again_only_for_the_same_batches(base, pairs, tmp_path, passes):
    small_steps.run(training("kto", tmp_path / "kto", base, pairs))
    for place, more, shared in (
        ("beta", {"beta": 0.3}, True),
        ("seed", {"seed": 2}, False),  # pairs of the estimate come from another order
        ("apo", {"loss_type": "apo_zero_unpaired"}, False),  # has no estimate
    ):
        before = len(passes)
        small_steps.run(training("kto", tmp_path / place, base, pairs, **more))
        assert (len(passes) == before) == shared, place


@pytest.mark.parametrize("harm", [b"", b"broken", None])
def test_a_broken_one_is_computed_again(harm, base, pairs, tmp_path, passes):
    first = result(training("dpo", tmp_path / "first", base, pairs))
    computed = len(passes)
    for file in (tmp_path / ".work/references").iterdir():
        assert file.suffix == ".safetensors"
        if harm is None:  # of other rows
            reference._write(file, {column: torch.zeros(3) for column in reference.DPO.COLUMNS})
        else:
            file.write_bytes(harm)
    assert result(training("dpo", tmp_path / "second", base, pairs)) == first
    assert len(passes) == 2 * computed


def test_a_machine_a_version_or_a_way_of_computing_is_part_of_it(base, pairs, tmp_path):
    job = training("dpo", tmp_path / "x", base, pairs)
    start = job.parents()["start"]
    about = reference.of(job, start)["follows_from"]
    for key, value in (("code", {"a": "b"}), ("packages", {"trl": "2"}), ("precision", "bf16"), ("threads", 2)):
        job.step[key], before = value, job.step.get(key)
        assert reference.of(job, start)["follows_from"] != about, key
        job.step[key] = before
    assert reference.of(job, start)["follows_from"] == about
    assert about["weights"] == start.weights_sha256 and about["torch"] == torch.__version__


def test_all_weights_are_not_hashed_for_a_name_that_nobody_reads(base, pairs, tmp_path, monkeypatch):
    from trl.trainer import dpo_trainer

    def hashed(model):
        raise AssertionError("hashed")

    monkeypatch.setattr(dpo_trainer, "hash_module", hashed)
    small_steps.built_trainer(tmp_path, "dpo", base, pairs, **MORE)
    assert dpo_trainer.hash_module is hashed


@pytest.mark.parametrize(
    "device, recomputed, layers, batch, rows",
    [("cuda", False, 24, 4, 32), ("cuda", False, 24, 16, 32), ("cuda", False, 24, 48, 48), ("cuda", False, 9, 4, 12),
     ("cuda", False, 2, 4, 4), ("cuda", True, 24, 4, 4), ("cpu", False, 24, 4, 4)],
)  # fmt: skip
def test_a_reference_goes_by_larger_batches_where_a_gpu_has_the_memory(device, recomputed, layers, batch, rows):
    from types import SimpleNamespace

    text = SimpleNamespace(num_hidden_layers=layers)
    trainer = SimpleNamespace(
        args=SimpleNamespace(device=torch.device(device), gradient_checkpointing=recomputed),
        model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text)),
    )
    assert reference.KeptReference._at_once(trainer, batch) == rows


def test_another_configuration_of_the_same_weights_is_another_start(base, pairs, tmp_path):
    """What a model computes is in its config.json as well."""
    from workflow_scripts.artifacts import manifests

    start = manifests.read(base)
    job = training("dpo", tmp_path / "one", base, pairs)
    one = reference.of(job, start)["follows_from"]
    start.data["files"]["config.json"] = "another"
    assert reference.of(job, start)["follows_from"] != one


def test_a_reference_that_cannot_be_kept_is_said_and_fails_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    reference._write(tmp_path / "file/x.safetensors", {"a": torch.zeros(2)})
    assert "not kept" in capsys.readouterr().out


def test_what_is_kept_has_the_mode_that_the_umask_asks_for(tmp_path):
    import os

    before = os.umask(0o002)
    try:
        reference._write(tmp_path / "references/x.safetensors", {"a": torch.arange(2.0)})
    finally:
        os.umask(before)
    file = tmp_path / "references/x.safetensors"
    assert file.stat().st_mode & 0o777 == 0o664 and list(file.parent.iterdir()) == [file]
    assert reference._read(file, 2)["a"].tolist() == [0, 1]
