"""bitsandbytes as on another CPU: the switch works, and a page stays free of its
warning.
"""

import os
import subprocess
import sys
from pathlib import Path

SWITCH = Path(__file__).parent / "bitsandbytes_as"
CODE = """
import logging

asked = []
warning = logging.Logger.warning


def noted(self, message, *args, **kwargs):
    asked.append(message)
    warning(self, message, *args, **kwargs)


logging.Logger.warning = noted
import llmlab.course
from llmlab.course.four_bits import without_compiler

with without_compiler():
    import bitsandbytes as bnb

print(bnb.functional.has_avx512bf16(), bnb.backends.cpu.ops._has_avx512)
print(sum("Failed to load CPU gemm_4bit_forward" in message for message in asked))
"""


def imported_as_on(cpu):
    """(stdout, stderr, exit status) of a lesson's import of bitsandbytes as on
    `cpu`.
    """
    settings = {"PYTHONPATH": str(SWITCH), "BITSANDBYTES_AS_ON": cpu}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.stdout.split(), done.stderr.strip(), done.returncode


def test_the_missing_package_of_avx512_bf16_is_not_mentioned_on_a_page():
    # bitsandbytes warns, once, and nobody sees it.
    assert imported_as_on("avx512bf16") == (["True", "True", "1"], "", 0)


def test_a_cpu_that_is_not_known_is_refused():
    out, err, status = imported_as_on("avx1024")
    assert "BITSANDBYTES_AS_ON='avx1024' must be one of ('avx2', 'avx512'" in err
    assert status != 0 and not out
