"""A kept hash is used for the files as they were, and for no others; a cache that can't be used costs the reading alone."""

import json
import os

import pytest

from workflow_scripts.plumbing.content_cache import ContentCache
from workflow_scripts.plumbing.messages import InputError


@pytest.fixture
def read(tmp_path):
    """read(files, settings, cache): the texts of the files, as a hash of them, by a cache that was just opened. Counts how often
    they were read."""

    def of(files, settings=(), cache=tmp_path / "work/cache.json"):
        def make() -> str:
            of.times += 1
            return "".join(file.read_text() for file in files) + str(settings)

        return ContentCache(str(cache) if cache else None).hash_of(files, make, settings)

    of.times = 0
    return of


@pytest.fixture
def files(tmp_path):
    made = [tmp_path / name for name in ("one", "two")]
    for file in made:
        file.write_text(file.name)
    return made


def test_files_are_read_once_for_each_setting(read, files):
    assert read(files) == read(files) == "onetwo()" and read.times == 1
    assert read(files, [3, None]) == read(files, [3, None]) == "onetwo[3, None]" and read.times == 2
    assert read(files[:1]) == "one()" and read.times == 3


def test_another_content_is_read_whatever_its_time_says(read, files):
    assert read(files) == "onetwo()"
    stat = files[1].stat()
    files[1].write_text("owt")  # of the same size
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read(files) == "oneowt()"
    (files[0].parent / "new").write_text("eno")
    os.utime(files[0].parent / "new", ns=(files[0].stat().st_atime_ns, files[0].stat().st_mtime_ns))
    (files[0].parent / "new").replace(files[0])
    assert read(files) == "enoowt()" and read.times == 3


def test_without_a_file_nothing_is_kept(read, files, tmp_path):
    assert read(files, cache=None) == read(files, cache=None) == "onetwo()" and read.times == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("broken", [b"", b"{", b"[1]", b"\xff", b'"text"'])
def test_a_broken_cache_is_made_anew(read, files, tmp_path, broken):
    read(files)
    cache = tmp_path / "work/cache.json"
    whole = cache.read_bytes()
    cache.write_bytes(broken)
    assert read(files) == "onetwo()" and read.times == 2 and cache.read_bytes() == whole


def test_a_hash_that_is_no_text_is_not_believed(read, files, tmp_path):
    read(files)
    cache = tmp_path / "work/cache.json"
    cache.write_text(json.dumps(dict.fromkeys(json.loads(cache.read_text()), 7)))
    assert read(files) == "onetwo()" and read.times == 2


def test_a_cache_that_cannot_be_written_costs_the_reading_alone(read, files, tmp_path):
    (tmp_path / "taken").write_text("a file, where the folder would be")
    (tmp_path / "folder.json").mkdir()
    for cache in (tmp_path / "taken/cache.json", tmp_path / "folder.json"):
        before = read.times
        assert read(files, cache=cache) == read(files, cache=cache) == "onetwo()" and read.times == before + 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.json", "one", "taken", "two"]  # and leaves nothing


def test_a_file_that_is_gone_is_named_and_an_error_is_not_kept(read, files, tmp_path):
    with pytest.raises(InputError, match=r"/one: cannot be read: No such file or directory$"):
        files[0].unlink()
        read(files)
    with pytest.raises(IsADirectoryError):  # from `make`
        files[0].mkdir()
        read(files)
    files[0].rmdir()
    files[0].write_text("one")
    assert read(files) == "onetwo()"
