"""The doctor finds what is wrong and says what to do.

Its exit code says whether anything is bad.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmlab.course import cpu, doctor, four_bits
from llmlab.course.doctor import BAD, GOOD, NOTE, Finding
from tests.preloaded import Preloaded


def test_each_package_at_another_version_is_named(monkeypatch):
    real = doctor.installed
    monkeypatch.setattr(
        doctor, "installed", lambda name: "0.0.1" if name == "torch" else real(name)
    )
    finding = doctor.packages()
    assert (
        finding.verdict == BAD
        and "torch 0.0.1 (lock: 2.13.0)" in finding.found
        and "make env" in finding.advice
    )


def test_an_unimportant_difference_is_a_note(monkeypatch):
    real = doctor.installed
    monkeypatch.setattr(
        doctor, "installed", lambda name: "0.0.1" if name == "tinycss2" else real(name)
    )
    assert doctor.packages().verdict == NOTE


def test_a_missing_package_is_bad(monkeypatch):
    real = doctor.installed
    monkeypatch.setattr(
        doctor, "installed", lambda name: None if name == "peft" else real(name)
    )
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


def test_a_slow_forward_pass_is_noted(monkeypatch):
    monkeypatch.setattr(doctor, "SLOW", 0.0)
    finding = doctor.forward()
    assert finding.verdict == NOTE and "as expected" in finding.found
    assert "OMP_NUM_THREADS=1" in finding.advice


CPUINFO_X86 = """\
processor\t: 0
model name\t: AMD EPYC 9354 32-Core Processor
flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16
"""
CPUINFO_ARM = """\
processor\t: 0
Features\t: fp asimd sve i8mm bf16
CPU implementer\t: 0x41
"""
SYSCTL = """\
machdep.cpu.brand_string: Apple M2
hw.optional.neon: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_I8MM: 0
"""


def test_the_cpu_is_read_on_x86_arm_and_mac():
    name, has = cpu.from_cpuinfo(CPUINFO_X86)
    assert name == "AMD EPYC 9354 32-Core Processor"
    assert has == ("AVX2", "AVX-512", "AVX-512-BF16", "AVX-512-VNNI")
    assert cpu.from_cpuinfo(CPUINFO_ARM) == ("", ("NEON", "SVE", "BF16", "I8MM"))
    assert cpu.from_cpuinfo("") == ("", ())
    assert cpu.from_sysctl(SYSCTL) == ("Apple M2", ("NEON", "BF16"))
    assert cpu.from_sysctl("") == ("", ())


def test_without_a_list_of_flags_the_cpu_has_a_name_still(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(cpu.sys, "platform", "linux")
    name, has = cpu.identify()
    assert name and has == ()


def test_what_the_cpu_changes_is_said(monkeypatch):
    zen4 = cpu.Cpu(*cpu.from_cpuinfo(CPUINFO_X86), "AVX512")
    monkeypatch.setattr(cpu, "describe", lambda: zen4)
    finding = doctor.cpu()
    assert finding.verdict == NOTE and "AVX-512-BF16" in finding.found
    assert "decodes 4-bit weights wrongly" in finding.advice
    assert "model.train() before the first forward" in finding.advice
    monkeypatch.setattr(cpu, "describe", lambda: cpu.Cpu("old", ("AVX2",), "AVX2"))
    assert doctor.cpu() == Finding("CPU", GOOD, "old: AVX2; torch uses AVX2")


AS_CPU = Path(__file__).resolve().parents[1] / "peft" / "bitsandbytes_as"


@pytest.fixture(scope="module")
def preloaded():
    """Starts the examinations below without torch's import in each."""
    process = Preloaded()
    yield process
    process.close()


@pytest.mark.parametrize(
    ("told", "verdict", "found", "advice"),
    [
        ("avx2", GOOD, "gradient passes", ""),
        ("avx512", NOTE, "uneven rows off by", "block sizes that divide a row"),
        ("avx512bf16", NOTE, "then NO gradient passes", "call model.train()"),
    ],
)
def test_a_4_bit_product_on_each_kind_of_cpu(
    monkeypatch, preloaded, told, verdict, found, advice
):
    paths = [str(AS_CPU), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("BITSANDBYTES_AS_ON", told)
    monkeypatch.setattr(
        four_bits.subprocess,
        "run",
        lambda command, **_: preloaded.run(command, dict(os.environ)),
    )
    finding = doctor.four_bits()
    assert finding.verdict == verdict, finding
    assert found in finding.found and advice in finding.advice


def test_a_product_that_is_wrong_or_dies_is_bad(monkeypatch):
    wrong = four_bits.Result(trained=0.3)
    monkeypatch.setattr(four_bits, "in_a_process_of_its_own", lambda: wrong)
    assert doctor.four_bits().verdict == BAD
    monkeypatch.undo()
    ends = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    own = subprocess.run
    monkeypatch.setattr(
        four_bits.subprocess,
        "run",
        lambda command, **more: own([sys.executable, "-c", ends], **more),
    )
    finding = doctor.four_bits()
    assert finding.verdict == BAD and "signal 4" in finding.found


def test_forward_and_all_reduce_are_good_here(monkeypatch):
    monkeypatch.setattr(doctor, "SLOW", 600.0)
    assert doctor.forward().verdict == GOOD, doctor.forward()
    assert doctor.all_reduce().verdict == GOOD


@pytest.mark.parametrize(("verdict", "code"), [(GOOD, 0), (NOTE, 0), (BAD, 1)])
def test_the_exit_code(monkeypatch, tmp_path, capsys, verdict, code):
    monkeypatch.setattr(
        doctor, "EXAMINATIONS", (lambda: Finding("Thing", verdict, "a", "do b"),)
    )
    assert doctor.run(tmp_path / "out.json") == code
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["ok"] is (code == 0) and report["findings"][0]["advice"] == "do b"
    assert "Thing" in capsys.readouterr().out


def test_an_examination_that_raises_is_a_finding(monkeypatch):
    def broken():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "EXAMINATIONS", (broken, doctor.python))
    first, second = doctor.examine()
    assert (
        first.verdict == BAD
        and "no such thing" in first.found
        and second.verdict == GOOD
    )


def test_the_record_of_a_run_names_the_cpu_and_old_records_still_show(tmp_path):
    from llmlab.course.book import pages
    from llmlab.course.book.verified import Records, Run
    from llmlab.course.syllabus import find

    (tmp_path / "notebooks" / "04-peft").mkdir(parents=True)
    old = {"date": "2026-11-24", "seconds": 9.5, "memory_gib": 0.5, "versions": {}}
    name = "notebooks/04-peft/05-lora"
    (tmp_path / f"{name}.ipynb").write_text("{}")
    page = pages.verified({name: old}, [find("lora")], tmp_path)
    assert "| 9.5 | 0.50 | not recorded |" in page
    run = Run("x", 9.5, 0.5, "d", {}, "AMD EPYC", ["AVX2"], "AVX2")
    (tmp_path / "jupyter-book").mkdir()
    Records(tmp_path).write(name, run)
    page = pages.verified(Records(tmp_path).read(), [find("lora")], tmp_path)
    assert "| AMD EPYC (AVX2; torch: AVX2) |" in page
