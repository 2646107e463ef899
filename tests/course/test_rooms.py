"""The picture of the rooms on the contributor page is what the imports say."""

from __future__ import annotations

import re

import pytest

from llmlab.course.book import rooms


@pytest.fixture
def house(tmp_path, monkeypatch):
    """Three rooms: the roof imports walls and ground, the walls import the ground."""
    part = tmp_path / "house" / "part"
    (part / "walls").mkdir(parents=True)
    (part / "__init__.py").write_text("from house.part.roof import tile\n")
    (part / "roof.py").write_text(
        "def tile():\n    from house.part import walls\n    import house.part.ground\n"
    )
    (part / "walls" / "__init__.py").write_text("")
    (part / "walls" / "brick.py").write_text("from house.part.ground import soil\n")
    (part / "ground.py").write_text("import os\n")
    monkeypatch.setattr(rooms, "PACKAGE", tmp_path / "house")
    return part


def test_imports_are_found_wherever_they_stand(house):
    assert rooms.arrows("part") == {
        "roof": {"walls", "ground"},
        "walls": {"ground"},
        "ground": set(),
    }
    assert rooms.floors("part") == [["roof"], ["walls"], ["ground"]]


def test_an_arrow_that_follows_from_others_is_left_out(house):
    assert rooms.direct(rooms.arrows("part"))["roof"] == {"walls"}
    assert rooms.picture("part").count("<path") == 2
    assert "roof imports ground, walls; walls imports ground." in rooms.sentence("part")


@pytest.mark.parametrize("part", rooms.DRAWN)
def test_every_arc_leads_down(part):
    arcs = re.findall(
        r'd="M\d+ (\d+) C.* (\d+)"', rooms.picture(part).replace(">", "\n")
    )
    assert arcs
    assert all(int(start) < int(end) for start, end in arcs)
