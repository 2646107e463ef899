"""The script for adapters at scale, on a small scale: each method trains and writes a
folder that its `load` opens.
"""

import pytest
import torch

from llmlab.models import course_model
from llmlab.peft.adapters import bottleneck
from llmlab.peft.examples import bottleneck_text

# bottlenecks on four blocks
PLACES = {"houlsby": 8, "pfeiffer": 4, "mam": 4, "unipelt": 4}


@pytest.mark.parametrize("method", bottleneck_text.METHODS)
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
    small = [
        "--steps",
        "3",
        "--batch",
        "2",
        "--context",
        "24",
        "--tokens",
        "3",
        "--bottleneck",
        "6",
        "--gate-tokens",
        "8",
    ]
    bottleneck_text.main([*paths, *small, "--method", method])
    model = bottleneck_text.METHODS[method][0].load(
        course_model.load(), tmp_path / "out"
    )
    nets = [
        net for site in bottleneck.sites(model).values() for net in site.nets.values()
    ]
    assert [tuple(net.down.weight.shape) for net in nets] == [(6, 128)] * PLACES[method]
    # it starts at zero, so this has been trained
    assert all(net.up.bias.abs().max() > 0 for net in nets)
    assert torch.isfinite(model(torch.arange(2, 9)[None])).all()
    out = capsys.readouterr().out
    first, last = (
        float(out.split(f" at the {when}")[0].split()[-1])
        for when in ("first step", "last")
    )
    assert last < first + 0.5 and "adapter saved" in out
