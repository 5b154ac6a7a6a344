import pytest

from tests.support import small_steps
from tests.support.slicer import Slicer
from workflow_scripts.artifacts import manifests
from workflow_scripts.models import chat


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_steps.write_base(tmp_path_factory.mktemp("formats") / "base", shape={"max_position_embeddings": 8192})


@pytest.fixture(scope="module")
def tokenizer(base):
    return chat.tokenizer_of(manifests.read(base))


@pytest.fixture
def slicer(tmp_path, monkeypatch, tokenizer):
    """Slices with the tiny world's tokenizer and template."""
    monkeypatch.setattr(chat, "tokenizer_of", lambda base: tokenizer)
    return Slicer(tmp_path)
