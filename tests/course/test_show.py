import json

import pytest

from llmlab.course import show
from llmlab.models import cache
from llmlab.models.llama import Llama, RMSNorm, rotate


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: found.append(data))
    return found


def test_source_comes_with_its_path_in_the_package(shown):
    show(rotate, RMSNorm)
    first, second = shown
    assert first["text/plain"].startswith("# llmlab/models/llama.py\ndef rotate(")
    assert "<code>llmlab/models/llama.py</code>" in first["text/html"]
    assert '<div class="highlight">' in first["text/html"]
    assert 'class="k">class</span>' in second["text/html"]


def test_methods_lose_their_indent(shown):
    show(Llama.forward)
    assert shown[0]["text/plain"].splitlines()[1].startswith("def forward(")


def test_a_whole_module(shown):
    show(cache)
    assert shown[0]["text/plain"].startswith("# llmlab/models/cache.py\n")


def test_other_libraries_and_properties(shown):
    show(json.dumps, property(rotate))
    assert shown[0]["text/plain"].startswith("# json/__init__.py\n")
    assert "def rotate(" in shown[1]["text/plain"]


def test_nothing_about_this_machine_or_run(shown):
    show(rotate)
    show(rotate)
    assert shown[0] == shown[1]
    assert cache.__file__.rsplit("/", 3)[0] not in str(shown[0])


@pytest.mark.parametrize("thing", [len, 3, "text"])
def test_what_has_no_source_is_refused(thing):
    with pytest.raises(ValueError, match="written in Python"):
        show(thing)


def test_nothing_to_show():
    with pytest.raises(ValueError, match="at least one"):
        show()
