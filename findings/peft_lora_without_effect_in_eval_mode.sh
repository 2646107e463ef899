#!/usr/bin/env bash
# peft 0.21.2 beside torch 2.13.0: one would expect that a model answers with its
# adapter in eval mode as in train mode (no dropout here). With LoRA on the MLP of an
# nn.TransformerEncoderLayer (linear1, linear2) it acts in train mode and gets
# gradients; in eval mode the output is the base's. The layer's fast path takes
# linear1.weight, which behind peft's wrapper is the base's, and calls no linear. It is
# taken with gradients on, too, since the base is frozen. Nothing warns.
#
# To see it: in eval mode, gradients on, the output has requires_grad False. What helps:
# torch.backends.mha.set_fastpath_enabled(False), or merge_and_unload() before
# evaluation.
#
# Seen:
#   adapter in train mode: moves the output by 1.30
#   eval mode, gradients on: off the base by 5e-07, requires_grad False
#   eval mode, no_grad: off the base by 5e-07, off train mode by 1.30
#   the same, fast path off: off train mode by 0e+00
#   merged, fast path on: off train mode by 3e-07
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.10 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip numpy==2.4.6 peft==0.21.2 transformers==5.23.0

HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

print(f"peft {version('peft')}, torch {version('torch')}")
warnings.simplefilter("error")  # it would end here if anything warned


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            16, 2, 32, dropout=0.0, batch_first=True
        )

    def forward(self, x):
        return self.layer(x)


def off(a, b):
    return (a - b).abs().max().item()


torch.manual_seed(0)
net, x = Net(), torch.randn(2, 3, 16)
plain = net(x).detach()
config = LoraConfig(r=4, target_modules=["linear1", "linear2"], init_lora_weights=False)
model = get_peft_model(net, config)
trained = model.train()(x)
trained.sum().backward()
reached = all(p.grad is not None for p in model.parameters() if p.requires_grad)
trained = trained.detach()
effect = off(trained, plain)
with_gradients = model.eval()(x)
with torch.no_grad():
    evaluated = model(x)
    torch.backends.mha.set_fastpath_enabled(False)
    slow = model(x)
    torch.backends.mha.set_fastpath_enabled(True)
    merged = model.merge_and_unload()(x)

print(f"adapter in train mode: moves the output by {effect:.2f}")
print(
    f"eval mode, gradients on: off the base by {off(with_gradients, plain):.0e},"
    f" requires_grad {with_gradients.requires_grad}"
)
print(
    f"eval mode, no_grad: off the base by {off(evaluated, plain):.0e},"
    f" off train mode by {off(evaluated, trained):.2f}"
)
print(f"the same, fast path off: off train mode by {off(slow, trained):.0e}")
print(f"merged, fast path on: off train mode by {off(merged, trained):.0e}")
as_stated = (
    reached
    and effect > 0.5
    and off(with_gradients, plain) < 1e-5
    and not with_gradients.requires_grad
    and off(evaluated, plain) < 1e-5
    and off(slow, trained) < 1e-5
    and off(merged, trained) < 1e-5
)
print("as stated" if as_stated else "changed")
sys.exit(not as_stated)
PYTHON
