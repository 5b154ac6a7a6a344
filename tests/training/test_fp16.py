"""`precision: fp16`, for cards without bf16: losses are scaled, what trains is fp32, and a step whose gradients overflow is left
out.

Accelerate computes in fp16 on GPUs only. Here its Accelerator is given on a CPU what it makes on one: autocast to fp16, and
torch's GradScaler. All else is the steps' own. On a card: tests/gpu/test_gpu.py.
"""

import pandas
import pytest
import torch
from accelerate import Accelerator

from tests.support import small_steps
from tests.support.right_way import sample
from workflow_scripts.artifacts import manifests
from workflow_scripts.config.config import load
from workflow_scripts.plumbing.messages import InputError

STEPS = {"max_steps": 6, "logging_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
SAMPLED = {"max_completion_length": 16, "steps_per_generation": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_steps.write_base(tmp_path_factory.mktemp("fp16") / "base", steps=60)


@pytest.fixture
def scaled(monkeypatch):
    """scaled(scale): accelerate's fp16 on a CPU, from this loss scale on. The scalers that were made."""
    made = []

    def begin(scale: float) -> list[torch.amp.GradScaler]:
        real = Accelerator.__init__

        def init(self, *args, **kwargs):
            real(self, *args, **kwargs)
            if self.state.mixed_precision == "fp16":
                made.append(torch.amp.GradScaler("cpu", init_scale=scale))
                self.native_amp, self.scaler = True, made[-1]

        monkeypatch.setattr(Accelerator, "__init__", init)
        return made

    return begin


def train(folder, experiment: str, base, precision: str) -> manifests.Artifact:
    rows = {"sft": small_steps.sft_slice, "ppo": small_steps.instructions_slice}.get(experiment[:3], small_steps.pairs_slice)
    config = small_steps.train_config(experiment, **STEPS, **(SAMPLED if experiment[:3] == "ppo" else {}))
    out = folder / precision / "adapter" / "manifest.json"
    job = small_steps.job(f"train_{config['method']}", out, {"start": base, "rows": rows(folder / f"rows_{precision}")}, config)
    job.step |= {"precision": precision}
    return small_steps.run(job)


def curve(adapter: manifests.Artifact, column: str) -> list[float]:
    return pandas.read_csv(adapter.folder / "metrics.csv")[column].dropna().tolist()


@pytest.mark.trained
@pytest.mark.parametrize("experiment", sample("sft_v2", "ppo_ifeval", "dpo", "rm", "kto", n=2))
def test_each_method_trains_in_fp16_as_it_does_in_fp32(tmp_path, base, scaled, experiment, figure):
    scalers = scaled(2.0**16)
    half, full = (train(tmp_path, experiment, base, precision) for precision in ("fp16", "fp32"))
    assert len(scalers) == 1 and scalers[0].get_scale() == 2.0**16 and half.data["adapter_moved"] == 1.0
    # Two rollouts of slightly different numbers part at the first token that falls the other way: the first step is the same.
    columns, steps = (
        (("value_loss", "value_grad_norm", "grad_norm"), 1) if experiment[:3] == "ppo" else (("loss", "grad_norm"), 6)
    )
    for column in columns:
        both = zip(curve(half, column)[:steps], curve(full, column)[:steps], strict=True)
        figure(f"gap of {column}, relative", max(abs(a - b) / abs(b) for a, b in both), at_most=0.03)


@pytest.mark.parametrize("experiment", sample("ppo_ifeval", "sft_v2"))
def test_a_step_whose_gradients_overflow_changes_nothing_and_lowers_the_scale(tmp_path, base, scaled, experiment):
    scalers = scaled(2.0**60)
    made = train(tmp_path, experiment, base, "fp16")
    assert scalers[0].get_scale() == 2.0**54  # halved by each of the six steps
    assert made.data["adapter_moved"] == 0.0 and made.data["objective"]["change"]  # and the manifest says that nothing trained
    from safetensors.torch import load_file

    assert all(torch.isfinite(weight).all() for weight in load_file(made.folder / "adapter_model.safetensors").values())


def test_the_value_function_overflows_alone_and_holds_the_policy_back_too(tmp_path, base, scaled, monkeypatch):
    """One optimiser, one verdict: half a step would leave the two of different ages."""
    from workflow_scripts.rl import advantages

    real = advantages.value_loss

    def huge(*args):
        loss, clipped = real(*args)
        return loss * 1e36, clipped

    monkeypatch.setattr(advantages, "value_loss", huge)
    scaled(2.0**16)
    assert train(tmp_path, "ppo_ifeval", base, "fp16").data["adapter_moved"] == 0.0


def test_fp16_on_a_cpu_is_refused_where_it_is_written(tmp_path):
    (tmp_path / "over.yaml").write_text("precision: fp16\n")
    with pytest.raises(
        InputError, match="over.yaml: precision: found fp16 with device: cpu, where nothing scales its losses; set fp32"
    ):
        load(small_steps.ROOT / "config/config.yaml", tmp_path / "over.yaml")
