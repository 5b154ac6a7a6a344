"""A model's folder whose files were cut off, or never fetched: the file's name and a remedy, before anything is trained."""

import re

import pytest
import torch

from tests.support import small_steps
from workflow_scripts.models import sources
from workflow_scripts.plumbing.messages import InputError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path):
    small_steps.copy_tiny_base(tmp_path / "model").unlink()
    return tmp_path / "model"


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_seen_when_the_plan_is_made(model, name):
    (model / name).write_text(POINTER)
    with pytest.raises(InputError, match=rf"{name}: a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"):
        sources.folder_hashes(model)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_that_was_cut_off_is_named(model, name, keep):
    text = (model / name).read_text()
    (model / name).write_text(text.rstrip()[: int(keep * (len(text.rstrip()) - 1))])
    with pytest.raises(InputError, match=rf"model/{name}: not valid JSON .*cut off, or is no such file; fetch it again"):
        sources.from_folder(model, torch.float32)


def test_a_config_that_was_cut_off_is_named_when_the_plan_is_made(model):
    """The plan reads it for its estimates: a traceback there, and with `--quiet all` exit status 1 without a word."""
    (model / "config.json").write_text((model / "config.json").read_text()[:300])
    with pytest.raises(InputError, match=r"model/config.json: not valid JSON .*cut off, or is no such file; fetch it again"):
        sources.folder_hashes(model)


@pytest.mark.parametrize(
    "keep, says", [(-1000, r"[\d,]+ bytes, expected [\d,]+ by its header"), (100, "has no header"), (3, "no header")]
)
def test_weights_that_were_cut_off_are_named(model, keep, says):
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:keep])
    with pytest.raises(InputError, match=rf"{WEIGHTS}: .*{says}.*fetch it again"):
        sources.from_folder(model, torch.float32)


def test_weights_of_another_shape_than_the_config_says_are_told(model):
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(re.sub(r'"intermediate_size": \d+', '"intermediate_size": 640', config))
    with pytest.raises(InputError, match="model: the weights have other shapes than config.json says: .*; fetch both again"):
        sources.from_folder(model, torch.float32)


def test_a_whole_folder_loads(model):
    assert sources.from_folder(model, torch.float32)[0].config.model_type == "qwen2"
