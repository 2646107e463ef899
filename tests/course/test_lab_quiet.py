"""What JupyterLab does not show under `llmlab lab`: scripts of authors, and noise."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llmlab.course import lab
from llmlab.course.lab_contents import CourseContents, without_twins


@pytest.fixture
def root(tmp_path):
    for name in ("notebooks/a.ipynb", "work/a.ipynb"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"cells": [], "metadata": {}, "nbformat": 4}')
        path.with_suffix(".py").write_text("# %%\n")
    (tmp_path / "notebooks" / "alone.py").write_text("# %%\n")
    return tmp_path


def listed(root, folder) -> list[str]:
    contents = CourseContents(root_dir=str(root))
    model = asyncio.run(contents.get(folder, content=True))
    return sorted(entry["name"] for entry in model["content"])


def test_twins_of_the_course_are_hidden(root):
    assert listed(root, "notebooks") == ["a.ipynb", "alone.py"]


def test_the_learners_own_scripts_are_shown(root):
    assert listed(root, "work") == ["a.ipynb", "a.py"]


def test_a_folder_asked_for_without_its_files(root):
    contents = CourseContents(root_dir=str(root))
    assert asyncio.run(contents.get("notebooks", content=False))["content"] is None


def test_without_twins_leaves_all_else():
    names = ["x.py", "y.ipynb", "py", ".py", "x.new.ipynb"]
    assert without_twins([{"name": n} for n in names]) == [{"name": n} for n in names]


def test_extensions_do_not_talk(root, monkeypatch, capfd):
    assert "--Application.log_level=WARN" in lab.command(
        Path("/course"), port=None, browser=True
    )
    monkeypatch.setattr(lab, "prepare", lambda root: None)
    monkeypatch.setattr(lab, "use_warm_kernels", lambda cold: None)
    monkeypatch.setattr(lab, "warm_up", lambda: None)
    monkeypatch.setattr(lab.os, "execv", lambda *args: None)
    monkeypatch.chdir(root)
    lab.run(root=root)
    assert "JupyterLab starts" in capfd.readouterr().out
