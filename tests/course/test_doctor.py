"""The doctor finds what is wrong, says what to do, and its exit code says whether anything is bad."""

from __future__ import annotations

import json

import pytest

from llmlab.course import doctor
from llmlab.course.doctor import BAD, GOOD, NOTE, Finding


def test_each_package_at_another_version_is_named(monkeypatch):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: "0.0.1" if name == "torch" else real(name))
    finding = doctor.packages()
    assert finding.verdict == BAD and "torch 0.0.1 (lock: 2.13.0)" in finding.found and "make env" in finding.advice


def test_an_unimportant_difference_is_a_note(monkeypatch):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: "0.0.1" if name == "tinycss2" else real(name))
    assert doctor.packages().verdict == NOTE


def test_a_missing_package_is_bad(monkeypatch):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "peft" else real(name))
    assert doctor.packages().verdict == BAD and "peft" in doctor.packages().found


def test_this_environment_is_the_lock():
    assert doctor.packages().verdict == GOOD, doctor.packages().found


def test_little_memory_is_a_note(monkeypatch):
    import psutil

    class Little:
        available, total = 2**30, 2**31

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    assert doctor.memory().verdict == NOTE


def test_a_taken_port_is_a_note(monkeypatch):
    class Taken:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def connect_ex(self, address):
            return 0

    monkeypatch.setattr(doctor.socket, "socket", Taken)
    assert doctor.ports().verdict == NOTE


def test_no_compiler_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.compiler().verdict == NOTE


def test_a_wrong_forward_pass_is_bad(monkeypatch):
    from llmlab.models import course_model

    model = course_model.load()
    model.model.norm.weight.data.mul_(1.5)
    monkeypatch.setattr(course_model, "load", lambda: model)
    finding = doctor.forward()
    assert finding.verdict == BAD and "expected" in finding.found


def test_forward_and_all_reduce_are_good_here():
    assert doctor.forward().verdict == GOOD, doctor.forward()
    assert doctor.all_reduce().verdict == GOOD


@pytest.mark.parametrize(("verdict", "code"), [(GOOD, 0), (NOTE, 0), (BAD, 1)])
def test_the_exit_code(monkeypatch, tmp_path, capsys, verdict, code):
    monkeypatch.setattr(doctor, "EXAMINATIONS", (lambda: Finding("Thing", verdict, "a", "do b"),))
    assert doctor.run(tmp_path / "out.json") == code
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["ok"] is (code == 0) and report["findings"][0]["advice"] == "do b"
    assert "Thing" in capsys.readouterr().out


def test_an_examination_that_raises_is_a_finding(monkeypatch):
    def broken():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "EXAMINATIONS", (broken, doctor.python))
    first, second = doctor.examine()
    assert first.verdict == BAD and "no such thing" in first.found and second.verdict == GOOD
