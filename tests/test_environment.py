"""The lock, pyproject.toml and environment.yml name the same versions.

The commands of the README exist.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LOCK = {
    line.split("==")[0]: line.split("==")[1].split(";")[0].strip()
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if "==" in line
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1][
    "pip"
]


@pytest.mark.parametrize("line", PROJECT["dependencies"] + EXTRAS)
def test_the_lock_satisfies_pyproject_and_conda_has_the_same(line):
    wanted = Requirement(line)
    pin = LOCK[wanted.name.lower().replace("_", "-")]
    assert pin in wanted.specifier
    assert any(
        re.fullmatch(rf"{re.escape(wanted.name)}=={re.escape(pin)}( ;.*)?", x)
        for x in CONDA
    ), line


def test_the_packages_that_the_course_promises_are_dependencies():
    promised = (
        "jupyterlab jupytext nbval torch transformers peft deepspeed matplotlib"
        " ipywidgets bitsandbytes triton"
    )
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert set(promised.split()) <= names


def test_no_cuda_package_is_locked():
    assert not [name for name in LOCK if name.startswith(("nvidia", "cuda"))]


def test_readme_commands_are_make_targets():
    targets = set(
        re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    )
    used = set(re.findall(r"`make ([a-z]+)", (ROOT / "README.md").read_text()))
    assert {"lab", "test"} <= used <= targets


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
