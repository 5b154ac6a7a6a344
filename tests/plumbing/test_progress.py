"""How far a step is, where several run at once: a line of each on a board, and no bars that overwrite each other."""

import subprocess

import pytest

from workflow_scripts.plumbing import progress


@pytest.fixture
def board(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_board", None)
    progress.set_board(tmp_path / "board")
    return tmp_path / "board"


def test_the_board_has_the_line_of_each_that_works(board):
    bar = progress.Progress(10, "dpo")
    bar.step(4, "loss 0.5")
    assert bar.bar is None
    (line,) = progress.on_board(board)
    assert line.startswith("dpo: 4/10  loss 0.5  eta ")
    bar.close()
    assert progress.on_board(board) == []


def test_the_line_of_one_that_was_killed_goes(board):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (board / str(dead.pid)).write_text("kto: 1/9")
    assert progress.on_board(board) == [] and not (board / str(dead.pid)).exists()


def test_a_board_that_cannot_be_written_fails_no_step(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_board", None)
    (tmp_path / "file").write_text("")
    progress.set_board(tmp_path / "file/board")
    bar = progress.Progress(2, "rm")
    bar.step(2)
    bar.close()
