"""Making the tiny world's base: two makings are the same, and what cannot be made is told."""

import copy

import pytest
import torch

from tests.support.small_steps import CONFIG, SHAPE
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tiny import pretrain


@pytest.fixture
def numbers():
    found = copy.deepcopy(CONFIG.data["base"]["scratch"])
    found["documents"]["n"], found["model"] = 400, SHAPE
    found["train"] |= {"steps": 20, "batch": 16}
    return found


def test_two_makings_have_the_same_weights_and_another_seed_has_others(numbers):
    torch.set_num_threads(1)
    one, again, other = (pretrain.build(numbers, seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one if one[name].shape == other[name].shape)


def test_a_document_that_is_too_long_is_told_with_the_length_to_allow(numbers):
    numbers["train"]["max_length"] = 30
    says = r"^base\.scratch\.train\.max_length: found 30, but a document has \d+ tokens; raise it to \d+$"
    with pytest.raises(InputError, match=says):
        pretrain.build(numbers, 1)
