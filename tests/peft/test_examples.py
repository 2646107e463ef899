"""The script at scale, on a small scale: one process and two write adapters that both
libraries open.
"""

import pytest
import torch

from llmlab.models import course_model
from llmlab.peft import walk
from llmlab.peft.examples import lora_text
from llmlab.peft.lora import files
from tests import processes

SMALL = [
    "--steps",
    "3",
    "--batch",
    "2",
    "--context",
    "24",
    "--lr",
    "1e-2",
    "--rank",
    "2",
]


@pytest.fixture
def call(tmp_path):
    (tmp_path / "text.txt").write_text(
        course_model.corpus("bible", "valid")[:4000], encoding="utf-8"
    )
    return [
        "--model",
        str(course_model.MODEL),
        "--text",
        str(tmp_path / "text.txt"),
        "--out",
        str(tmp_path / "out"),
        *SMALL,
    ]


def test_one_process_trains_and_saves(call, tmp_path, capsys):
    lora_text.main(call)
    model = files.load(course_model.load(), tmp_path / "out")
    trained = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert len(trained) == 8 and all(p.abs().max() > 0 for p in trained)
    assert f"training {walk.trainable(model)[0]:,} of" in capsys.readouterr().out


def test_too_short_a_text_is_refused(call, tmp_path):
    (tmp_path / "text.txt").write_text("In the beginning", encoding="utf-8")
    with pytest.raises(
        ValueError,
        match=r"text\.txt has \d+ tokens; it must have more than --context 24",
    ):
        lora_text.main(call)


@pytest.mark.slow
def test_two_processes_are_one_with_the_mean_of_the_gradients(call, tmp_path):
    """After one step, the two ranks' adapter is what one process makes of both ranks'
    windows.
    """
    call = [*call, "--steps", "1"]
    args = lora_text.parser().parse_args(call)
    model, tokens = lora_text.load(args, torch.device("cpu"))
    torch.manual_seed(args.seed)
    lora_text.lora.apply(model, lora_text.lora.LoRAConfig(r=2, alpha=16))
    starts = [
        torch.randint(
            len(tokens) - 24, (2,), generator=torch.Generator().manual_seed(rank)
        )
        for rank in range(2)
    ]  # args.seed · world + rank
    window = tokens[torch.cat(starts)[:, None] + torch.arange(24)]
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=args.lr, weight_decay=0.0)
    lora_text.next_token_loss(model(window).logits, window).backward()
    torch.nn.utils.clip_grad_norm_(factors, 1.0)
    optimizer.step()

    # what takes long has been imported by now: the ranks are forks
    done = processes.run_fork(
        processes.torchrun_of_forks,
        *["--standalone", "--nproc-per-node=2", lora_text.__file__, *call],
        env=processes.on_cpu(),
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert done.stdout.count("adapter saved") == 1 and "on 2 × cpu" in done.stdout
    both = files.load(course_model.load(), tmp_path / "out")
    mine = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    theirs = {n: p for n, p in both.named_parameters() if "lora_B" in n}
    assert mine.keys() == theirs.keys()
    for name, p in mine.items():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-3)
