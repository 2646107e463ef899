"""The script for virtual tokens at scale, on a small scale: each method trains and
writes a folder that its `load` opens.
"""

import pytest

from llmlab.models import course_model
from llmlab.peft.examples import virtual_text
from llmlab.peft.prompt_and_prefix_tuning import virtual_tokens


@pytest.mark.parametrize("method", virtual_text.METHODS)
def test_one_process_trains_and_saves(method, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(
        course_model.corpus("bible", "valid")[:3000], encoding="utf-8"
    )
    paths = [
        "--model",
        str(course_model.MODEL),
        "--text",
        str(tmp_path / "text.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    small = ["--steps", "3", "--batch", "2", "--context", "24", "--tokens", "3"]
    virtual_text.main([*paths, *small, "--method", method])
    module = virtual_text.METHODS[method][0]
    model = module.load(course_model.load(), tmp_path / "out")
    assert len(virtual_tokens.vectors_of(model.virtual_tokens.encoder)) == 3
    out = capsys.readouterr().out
    first, last = (
        float(out.split(f" at the {when}")[0].split()[-1])
        for when in ("first step", "last")
    )
    assert last < first + 0.5 and "adapter saved" in out
