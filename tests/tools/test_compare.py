"""The comparison by hand, and the table that `make demo` prints."""

import json

import pytest

from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools.compare import IFEVAL, paired, paired_table, read, table


def scores(*followed: bool) -> dict:
    share = sum(followed) / len(followed)
    made: dict = {metric: share for metric in IFEVAL} | {f"{metric}_stderr": 0.1 for metric in IFEVAL}
    made["n_prompts"] = len(followed)
    made["per_prompt"] = [{"key": key, "follow_instruction_list_strict": [ok, True]} for key, ok in enumerate(followed)]
    return made


def test_the_difference_is_paired_by_prompt():
    before, after = scores(False, False, True, True), scores(True, True, True, False)
    # differences 1, 1, 0, -1: mean 1/4, sum of squares around it 2.75, variance 2.75/3, standard error sqrt(2.75/12)
    assert paired(after, before) == pytest.approx((0.25, (2.75 / 12) ** 0.5))


def test_prompts_are_matched_by_key_and_not_by_position():
    before, after = scores(True, False, False), scores(True, False, False)
    after["per_prompt"].reverse()
    assert paired(after, before) == (0, 0)


def test_the_table_has_a_row_for_each_file_in_percent():
    text = table({"base": scores(False, True), "dpo": scores(True, True)}).to_string()
    assert "50.0 +- 10.0" in text and "100.0 +- 10.0" in text and "+50.0 +- 50.0 pp" in text


def test_two_files_make_a_paired_table_with_mcnemar():
    before, after = scores(*[False] * 8, *[True] * 4), scores(*[True] * 6, *[False] * 2, *[True] * 3, False)
    text = paired_table(before, after, ("sft_v2", "dpo"))
    assert "dpo - sft_v2: +41.7 points" in text and "6 prompts gained, 1 lost; McNemar's exact p 0.125" in text  # 2 (1 + 7) / 128
    assert [line.split() for line in text.splitlines()[2:4]] == [["fails", "2", "6"], ["passes", "1", "3"]]


def test_other_prompts_are_refused_and_never_averaged_over():
    before, after = scores(True, False, False), scores(True, False)
    with pytest.raises(InputError, match="prompt 2 and 0 more stand in one of two files only"):
        paired(after, before)


def test_files_of_one_name_in_two_folders_are_two_and_a_file_made_by_hand_will_do(tmp_path):
    for folder, share in (("a", True), ("b", False)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ifeval_dpo.json").write_text(json.dumps(scores(share, True)))
    files = [tmp_path / "a/ifeval_dpo.json", tmp_path / "b/ifeval_dpo.json"]
    assert list(read(files)) == list(map(str, files)) and list(read(files[:1])) == ["dpo"]
    with pytest.raises(InputError, match="given twice"):
        read([files[0], files[0]])
    with pytest.raises(InputError, match="no JSON object can be read"):
        read([tmp_path / "c.json"])
