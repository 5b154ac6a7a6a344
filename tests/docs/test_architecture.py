"""docs/architecture.md and its picture say what the code is."""

import re

import pytest

from tests.conftest import ROOT
from tests.support import floors

PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_the_picture_is_of_this_code():
    assert floors.PICTURE.read_text(encoding="utf-8") == floors.svg(), "draw it again: python -m tests.support.floors"


def test_every_room_has_a_floor_and_every_floor_is_on_the_page():
    rooms = {path.parent.name for path in (ROOT / floors.PACKAGE).glob("*/__init__.py")}
    assert {room for floor in floors.floors() for room in floor} == rooms
    assert all(f"`{room}/`" in PAGE for room in rooms)


@pytest.mark.parametrize("station", sorted(set(re.findall(r"`((?:workflow_scripts|rules|config|docs|tests)/[\w/.-]+)`", PAGE))))
def test_a_station_of_the_walks_is_there(station):
    assert (ROOT / station).exists()


@pytest.mark.parametrize(("file", "name"), sorted(set(re.findall(r"`([\w/]+\.(?:py|smk)):(\w+)`", PAGE))))
def test_what_a_station_names_stands_in_its_file(file, name):
    path = ROOT / file if (ROOT / file).exists() else ROOT / floors.PACKAGE / file
    assert re.search(rf"\b(def|class) {name}\b|^{name}\b", path.read_text(encoding="utf-8"), flags=re.M), f"{file} has no {name}"
