"""What tests that ask lm-eval itself share."""

import pytest


@pytest.fixture
def undescribed(monkeypatch):
    """Without lm-eval's description of the machine: it starts pip, git, the compiler and more, and stands beside the figures."""
    from lm_eval import evaluator

    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
