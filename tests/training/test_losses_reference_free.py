"""The losses of SimPO, CPO and ORPO, against values worked by hand: from numbers, and from log-probabilities as the steps train.

Each check is also held against losses that are broken on purpose, and has to refuse them.
"""

import importlib
from functools import partial
from types import SimpleNamespace

import numpy
import pytest
import torch

from tests.support import small_steps
from tests.training.test_losses import log_probs, plain_models, stir
from workflow_scripts.steps import train_cpo, train_orpo, train_simpo
from workflow_scripts.training.reference_free import PairsTrainer

METHODS = ("simpo", "cpo", "orpo")
# Two pairs: log-probabilities of chosen and rejected, summed over the answer, and how many tokens these have.
PAIRS = [torch.tensor(values, dtype=torch.float64) for values in ([-6.0, -2.0], [-4.0, -6.0], [3, 2], [4, 2])]
# A token: -2 and -1, then -1 and -3. log(1 - e^-1) = -0.458675, log(1 - e^-2) = -0.145413, log(1 - e^-3) = -0.051069.
BY_HAND = {
    # beta 2, gamma 1: rewards -4 and -2, so log(1 + e^3); rewards -2 and -6, so log(1 + e^-3)
    "simpo": (partial(train_simpo.loss, beta=2.0, gamma=1.0), [3.048587, 0.048587], [-2.0, 4.0]),
    # beta 0.1, alpha 0.5: log(1 + e^0.2) + 0.5 x 2; log(1 + e^-0.4) + 0.5 x 1
    "cpo": (partial(train_cpo.loss, beta=0.1, alpha=0.5), [1.798139, 1.013015], [-0.2, 0.4]),
    # beta 0.1: log odds -1.854587 and -0.541325, so 2 + 0.1 log(1 + e^1.313262); -0.541325 and -2.948931, so 1 and 0.1 of
    # log(1 + e^-2.407606)
    "orpo": (partial(train_orpo.loss, beta=0.1), [2.155144, 1.008621], [-1.313262, 2.407606]),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_a_pair_equals_the_one_worked_by_hand(method):
    loss, wanted, margins = BY_HAND[method]
    found, better, worse = loss(*PAIRS)
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)
    assert (better - worse).tolist() == pytest.approx(margins, abs=1e-5)


def test_the_formulas_are_those_of_trls_own_trainers():
    """What is left of these trainers here; their likelihood term is another mean, which is left out of the comparison."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected, n_chosen, n_rejected = PAIRS
    common = {"accelerator": SimpleNamespace(device="cpu"), "label_smoothing": 0.0, "alpha": 0.0, "simpo_gamma": 1.0}
    theirs, *_ = CPOTrainer.cpo_loss(
        SimpleNamespace(**common, loss_type="simpo", beta=2.0), chosen / n_chosen, rejected / n_rejected
    )
    assert BY_HAND["simpo"][0](*PAIRS)[0].tolist() == pytest.approx(theirs.tolist(), rel=1e-6)
    theirs, *_ = CPOTrainer.cpo_loss(SimpleNamespace(**common, loss_type="sigmoid", beta=0.1), chosen, rejected)
    assert train_cpo.loss(*PAIRS, beta=0.1, alpha=0.0)[0].tolist() == pytest.approx(theirs.tolist(), rel=1e-6)
    theirs, *_ = ORPOTrainer.odds_ratio_loss(SimpleNamespace(**common, beta=0.1), chosen / n_chosen, rejected / n_rejected)
    assert train_orpo.loss(*PAIRS, beta=0.1)[0].tolist() == pytest.approx((-chosen / n_chosen - theirs).tolist(), rel=1e-5)


def test_an_answer_that_is_certain_has_finite_odds_and_a_gradient():
    chosen = torch.tensor([0.0, -1e-9, -1e-3, -200.0], requires_grad=True)
    loss, better, worse = train_orpo.loss(chosen, torch.full((4,), -2.0), torch.ones(4), torch.ones(4), beta=0.1)
    loss.sum().backward()
    assert all(torch.isfinite(one).all() for one in (loss, better, worse, chosen.grad))
    assert better.argsort().tolist() == [3, 2, 1, 0] or better[0] == better[1] > better[2] > better[3]


# -- as the steps train -----------------------------------------------------------------------------------------------


class Case:
    """A trainer as its step builds it, one batch, and by numpy what an independent forward pass gives for it."""

    def __init__(self, method, folder, base, pairs):
        self.method = method
        self.trainer = small_steps.built_trainer(folder / method, method, base, pairs, quantise="none")
        stir(self.trainer)
        self.batch = self.trainer.data_collator([self.trainer.train_dataset[i] for i in range(6)])
        policy, reference = plain_models(self.trainer, base, folder / method)
        mask = self.batch["completion_mask"][:, 1:].numpy()
        self.chosen, self.rejected = numpy.split((log_probs(policy, self.batch) * mask).sum(1), 2)
        self.reference = [torch.tensor(one) for one in numpy.split((log_probs(reference, self.batch) * mask).sum(1), 2)]
        self.n_chosen, self.n_rejected = numpy.split(mask.sum(1), 2)
        assert len(set(self.n_chosen - self.n_rejected)) > 1  # not of one length

    def wanted(self):
        a, b = self.chosen / self.n_chosen, self.rejected / self.n_rejected
        if self.method == "simpo":
            return numpy.log1p(numpy.exp(-(2.0 * a - 2.0 * b - 1.0))).mean()
        if self.method == "cpo":
            return (numpy.log1p(numpy.exp(-0.1 * (self.chosen - self.rejected))) - a).mean()
        odds = numpy.log(numpy.exp(a) / (1 - numpy.exp(a))) - numpy.log(numpy.exp(b) / (1 - numpy.exp(b)))
        return (-a + 0.1 * numpy.log1p(numpy.exp(-odds))).mean()

    def found(self):
        self.trainer.model.eval()
        with torch.no_grad():
            return self.trainer.compute_loss(self.trainer.model, self.batch).item()

    def check(self):
        assert self.found() == pytest.approx(self.wanted(), rel=1e-5)


@pytest.fixture(scope="module")
def cases(folder, base, pairs):
    made = {}
    return lambda method: made.setdefault(method, Case(method, folder / "cases", base, pairs))


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_costs_what_is_worked_by_hand_from_an_independent_forward_pass(cases, method):
    cases(method).check()


def sign(loss, case, chosen, rejected, n_chosen, n_rejected):
    """Chosen and rejected change places."""
    return loss(rejected, chosen, n_rejected, n_chosen)


def lengths(loss, case, chosen, rejected, n_chosen, n_rejected):
    """No length normalisation: an answer is one token long."""
    return loss(chosen, rejected, torch.ones_like(n_chosen), torch.ones_like(n_rejected))


def one_length(loss, case, chosen, rejected, n_chosen, n_rejected):
    """Both answers are divided by the better one's length."""
    return loss(chosen, rejected, n_chosen, n_chosen)


def reference(loss, case, chosen, rejected, n_chosen, n_rejected):
    """A reference where there is none: ratios, as DPO's."""
    return loss(chosen - case.reference[0].float(), rejected - case.reference[1].float(), n_chosen, n_rejected)


BROKEN = [(method, how) for method in METHODS for how in (sign, lengths, one_length, reference)]
BROKEN.remove(("cpo", one_length))  # its likelihood is the better answer's alone


@pytest.mark.parametrize(("method", "how"), BROKEN, ids=lambda one: getattr(one, "__name__", one))
def test_a_loss_that_is_broken_is_seen(cases, method, how, monkeypatch):
    case = cases(method)
    monkeypatch.setattr(case.trainer, "loss_of_pairs", partial(how, case.trainer.loss_of_pairs, case))
    with pytest.raises(AssertionError):
        case.check()


@pytest.mark.parametrize(
    ("method", "keys"), [("simpo", ("beta", "simpo_gamma")), ("cpo", ("beta", "cpo_alpha")), ("orpo", ("beta",))]
)
def test_each_setting_of_a_loss_gets_there(base, pairs, tmp_path, method, keys):
    module = importlib.import_module(f"workflow_scripts.steps.train_{method}")
    values = dict(zip(keys, (0.7, 0.3), strict=False))
    trainer = small_steps.built_trainer(tmp_path, method, base, pairs, quantise="none", **values)
    names = {"simpo_gamma": "gamma", "cpo_alpha": "alpha"}
    assert trainer.loss_of_pairs.func is module.loss
    assert trainer.loss_of_pairs.keywords == {names.get(key, key): value for key, value in values.items()}


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_the_policy_is_run_and_prompts_have_no_part_in_the_loss(cases, method):
    case, ran = cases(method), []
    model = case.trainer.model
    hook = model.get_base_model().model.register_forward_hook(
        lambda *_: ran.append(any(not m.disable_adapters for m in adapters))
    )
    adapters = [module for module in model.modules() if hasattr(module, "lora_A") and len(module.lora_A)]
    case.found()
    hook.remove()
    assert ran == [True]
    assert "ref_chosen_logps" not in case.batch and case.trainer.ref_model is None
    # Of the prompt no likelihood is asked for.
    asked = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: asked.append(kwargs["labels"]), with_kwargs=True)
    case.found()
    hook.remove()
    assert ((asked[0] != -100) == (case.batch["completion_mask"] == 1)).all()


def test_the_figures_of_a_pair_are_those_of_its_loss(cases):
    case = cases("simpo")
    case.trainer._metrics["eval"].clear()
    case.found()
    found = {name: values[-1] for name, values in case.trainer._metrics["eval"].items()}
    a, b = case.chosen / case.n_chosen, case.rejected / case.n_rejected
    wanted = {"rewards/margins": 2 * (a - b).mean(), "rewards/accuracies": (a > b).mean(), "nll": -a.mean()}
    wanted |= {"logps/chosen": case.chosen.mean(), "logps/rejected": case.rejected.mean()}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert 0 < found["entropy"] < numpy.log(1024) and isinstance(case.trainer, PairsTrainer)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_ends_with_its_objective_its_curve_and_the_rows_that_it_had(base, pairs, tmp_path, method):
    adapter = small_steps.train(tmp_path, method, base, pairs, max_steps=2)
    facts, header = adapter.data, (adapter.folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert facts["adapter_moved"] == 1 and facts["left_out"] == {"train": 0, "heldout": 0}
    assert facts["rows"]["heldout"] == 8 and len(facts["rows"]["ids_sha256"]) == 64
    assert {"accuracy", "loss", "margin", "nll"} == set(facts["objective"]["before"]) == set(facts["objective"]["change"])
    assert all(numpy.isfinite(value) for value in facts["objective"]["after"].values())
    assert {"loss", "rewards/margins", "rewards/accuracies", "nll", "num_tokens", "entropy"} <= set(header)
