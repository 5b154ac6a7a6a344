"""The sources of a slice: JSONL, JSON and Parquet, several files as one, groups over them, and a hub's data set."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.data.test_formats import FILES, REAL, talk
from tests.support.slicer import Slicer, Words, chat_row, good, lines
from workflow_scripts.artifacts import manifests
from workflow_scripts.data import slicing
from workflow_scripts.models import chat
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import slice_data


@pytest.fixture
def slicer(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "tokenizer_of", lambda base: Words())
    return Slicer(tmp_path)


# -- files ----------------------------------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict], **more) -> bytes:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **more)
    return path.read_bytes()


def rows_of(file):
    data = (FILES / file).read_text()
    return json.loads(data) if file.endswith(".json") else [json.loads(line) for line in data.splitlines()]


PARQUET = [(file, kind) for file, kind in REAL if "/" not in file and file != "kto.jsonl"]  # that one mixes texts and turns


@pytest.mark.parametrize(("file", "kind"), PARQUET)
def test_jsonl_json_and_parquet_give_the_same_rows(file, kind, slicer, tmp_path):
    source = [row | {"unread": "x" * 50, "number": i} for i, row in enumerate(rows_of(file))]
    made = {
        "a.jsonl": lines(source),
        "a.json": json.dumps(source).encode(),
        "a.parquet": parquet(tmp_path / "a.parquet", source, row_group_size=2),
    }
    taken = {name: slicer(data, kind, name=name, max_prompt_tokens=10_000)[0] for name, data in made.items()}
    plain = {name: [{key: value for key, value in row.items() if key != "id"} for row in rows] for name, rows in taken.items()}
    assert plain["a.jsonl"] == plain["a.json"] == plain["a.parquet"] and len(plain["a.json"]) == 4
    assert [row["id"] for row in taken["a.parquet"]] == [f"a.parquet:{i}" for i in (1, 2, 3, 4)]


def test_parquet_is_read_in_the_columns_that_count_and_in_the_rows_that_were_drawn(slicer, tmp_path):
    source = [{"messages": talk(f"q{i}", f"a{i}"), "topic": i % 7, "blob": b"\x00", "other": i} for i in range(50)]
    data = parquet(tmp_path / "a.parquet", source, row_group_size=8)
    rows, manifest = slicer(data, name="a.parquet", rows=20, group_by="topic", heldout=6)
    picked = slicing.candidates([str(slicer.folder / "a.parquet")], 20, 1, "sft", "topic")
    assert [set(json.loads(row.text)) for row in picked] == [{"messages", "topic"}] * 20
    assert [row["messages"][0]["content"] for row in rows] == [f"q{row.number - 1}" for row in picked]
    assert [row["topic"] for row in rows] == [(row.number - 1) % 7 for row in picked] and manifest["rows"]["candidates"] == 20


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.parquet", b"PAR1 and then nothing", "a.parquet: cannot be read as Parquet: "),
        ("a.json", b"[", "a.json: not valid JSON: "),
        ("a.json", b"[]", "a.json: no rows in this file"),
        ("a.json", b"[3]", "a.json: row 1: expected a JSON object, found int"),
        ("a.json", b'{"data": [\n{"messages": []}\n]}', "a.json: line 1: not valid JSON: "),
        ("a.json", b"", "a.json: no rows in this file"),
    ],
)
def test_a_broken_file_is_one_error(name, data, says, slicer):
    assert says in slicer.error(data, name=name)


def test_a_json_file_of_one_object_a_line_is_jsonl(slicer):
    rows, _ = slicer(lines([{"messages": talk(f"q{i}", "a")} for i in range(3)]), name="a.json")
    assert [row["id"] for row in rows] == ["a.json:1", "a.json:2", "a.json:3"]


def test_a_parquet_file_without_a_known_column_lists_its_columns(slicer, tmp_path):
    data = parquet(tmp_path / "a.parquet", [{"text": "x", "source": "y"}])
    with pytest.raises(InputError, match=r"a.parquet: found the keys source, text, which is none of the formats for kind sft"):
        slicer(data, name="a.parquet")


def test_bytes_and_times_under_a_key_that_counts_are_refused(slicer, tmp_path):
    data = parquet(tmp_path / "a.parquet", [{"instruction": b"x", "output": "y"}])
    with pytest.raises(InputError, match=r"a.parquet: row 1: holds a value that JSON has no form for: .*bytes"):
        slicer(data, name="a.parquet")


# -- several files, groups, a hub ---------------------------------------------------------------------------------------


def several(slicer, files: dict, **config) -> manifests.Job:
    """A job over several files."""
    job = slicer.job(b"{}", **config)
    paths = [slicer.folder / name for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    job.config["source"] = {"files": list(files)}
    picked = slicing.candidates([str(p) for p in paths], job.config["rows"], 1, job.config["kind"], job.config.get("group_by"))
    job.step["external"] = {"candidate_rows": slicing.rows_hash(picked)}
    job.inputs = [*reversed(paths), *job.inputs[1:]]
    return job


def test_a_slice_of_several_files_draws_over_all_and_names_the_file_of_each_row(slicer):
    files = {"a.jsonl": lines(good("sft", 30)), "b.json": json.dumps([chat_row(f"r{i}", "a") for i in range(30)]).encode()}
    job = several(slicer, files, rows=20, heldout=3)
    slice_data.main(job)
    made = manifests.read(job.out)
    assert {row["id"].split(":")[0] for row in made.rows()} == {"a.jsonl", "b.json"} and len(made.rows()) == 20
    assert made.data["source"] == f"{slicer.folder}/a.jsonl, {slicer.folder}/b.json"
    job.config["source"]["files"].reverse()
    with pytest.raises(InputError, match="b.json, .*a.jsonl: changed since this step was planned"):
        slice_data.main(job)


def test_the_key_of_the_group_is_kept_and_its_rows_never_straddle_the_split(slicer):
    source = [chat_row(f"q{i}", "a") | {"tree_id": f"t{i % 9}", "other": 1} for i in range(60)]
    rows, _ = slicer(source, group_by="tree_id", heldout=20)
    assert all(set(row) == {"id", "messages", "tree_id", "heldout"} for row in rows)
    sides = {side: {row["tree_id"] for row in rows if row["heldout"] == side} for side in (True, False)}
    assert sides[True] and sides[False] and not sides[True] & sides[False]
    plain, _ = slicer(source, heldout=20)
    assert "tree_id" not in plain[0]
    assert {s["tree_id"] for s, r in zip(source, plain, strict=True) if r["heldout"]} & {
        s["tree_id"] for s, r in zip(source, plain, strict=True) if not r["heldout"]
    }  # without the key, trees straddle


def test_in_each_file_all_rows_have_the_groups_key_or_none(slicer):
    trees = [chat_row(f"q{i}", "a") | {"tree_id": i % 4} for i in range(12)]
    files = {"trees.jsonl": lines(trees), "others.jsonl": lines([chat_row(f"r{i}", "a") for i in range(9)])}
    job = several(slicer, files, group_by="tree_id", heldout=5)
    slice_data.main(job)
    assert [("tree_id" in row) for row in manifests.read(job.out).rows()] == [True] * 12 + [False] * 9
    job = several(slicer, {"trees.jsonl": lines([*trees, chat_row("r", "a")])}, group_by="tree_id", heldout=5)
    with pytest.raises(
        InputError, match=r"trees.jsonl: line 13: has no tree_id, which group_by names and other rows of this file"
    ):
        slice_data.main(job)
    job = several(slicer, {"trees.jsonl": lines(trees)}, group_by="tree", heldout=5)
    with pytest.raises(
        InputError, match=r"trees.jsonl: line 1: has no tree, which group_by names, and neither has any other row"
    ):
        slice_data.main(job)


REVISION = "0123456789abcdef0123456789abcdef01234567"


def hub_job(slicer, **source) -> manifests.Job:
    job = slicer.job(b"{}", rows=8, heldout=2)
    job.config["source"] = {"hub": "org/talk", "split": "train", "revision": REVISION, "shuffle_buffer": 10} | source
    job.config["source"] = {key: value for key, value in job.config["source"].items() if value is not None}
    job.step["external"] = {}
    job.inputs = job.inputs[1:]
    return job


@pytest.fixture
def hub(monkeypatch):
    """datasets.load_dataset over 100 rows made here, which counts the rows that it hands out."""
    import datasets

    calls = SimpleNamespace(asked=[], read=0, error=None)

    def made():
        for i in range(100):
            calls.read += 1
            yield chat_row(f"q{i}", f"a{i}")

    def load_dataset(*args, **kwargs):
        calls.asked.append((args, kwargs))
        if calls.error:
            raise calls.error
        return datasets.IterableDataset.from_generator(made)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_hub_data_set_is_streamed_through_a_seeded_shuffle_and_not_read_whole(slicer, hub):
    job = hub_job(slicer, config="default")
    slice_data.main(job)
    first = manifests.read(job.out)
    assert hub.asked == [(("org/talk",), {"name": "default", "split": "train", "revision": REVISION, "streaming": True})]
    assert hub.read <= 20  # eight rows out of a buffer of ten
    rows = first.rows()
    assert [row["id"] for row in rows] == [f"org/talk/train:{i}" for i in range(1, 9)]
    asked = [int(row["messages"][0]["content"][1:]) for row in rows]
    assert len(set(asked)) == 8 and asked != sorted(asked) and max(asked) < 20
    assert "unpinned" not in first.data and first.data["source"] == f"org/talk@{REVISION}, split train"
    slice_data.main(job)
    assert manifests.read(job.out).rows() == rows
    job.config["seed"] = 2
    slice_data.main(job)
    assert [row["messages"] for row in manifests.read(job.out).rows()] != [row["messages"] for row in rows]


def test_an_unpinned_hub_source_is_stated_in_the_manifest(slicer, hub):
    job = hub_job(slicer, revision=None)
    slice_data.main(job)
    assert manifests.read(job.out).data["unpinned"] is True and hub.asked[0][1]["revision"] is None


@pytest.mark.parametrize(
    ("offline", "remedy"), [("1", "set HF_HUB_OFFLINE=0 .it is on here."), ("0", "run where there is a network")]
)
def test_a_hub_that_cannot_be_reached_is_one_error_with_the_remedies(slicer, hub, monkeypatch, offline, remedy):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    hub.error = ConnectionError("Couldn't reach\nthe Hub")
    with pytest.raises(InputError) as caught:
        slice_data.main(hub_job(slicer))
    text = str(caught.value)
    assert (
        "\n" not in text
        and f"org/talk@{REVISION}, split train: could not be read from the hub (ConnectionError: Couldn't" in text
    )
    assert "source: {path: ...}" in text and "HF_ENDPOINT to a mirror" in text and re.search(remedy, text)


def test_a_malformed_row_of_a_hub_names_data_set_revision_and_row(slicer, hub, monkeypatch):
    import datasets

    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "x"}] * 5))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    with pytest.raises(InputError, match=f"org/talk@{REVISION}, split train: row 1: found the keys text, which is none"):
        slice_data.main(hub_job(slicer))
