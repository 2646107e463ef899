"""SmolLM2-135M-Instruct from the course's folder, run by PaddleFormers.

Its logits are kept in llmlab/chips/ascend_and_other_accelerators/data/smollm2.json.

Two steps, each in its own environment, from the repository's root:

    PADDLE/bin/python scripts/golden/port_smollm2_goldens.py paddle FOLDER
    python scripts/golden/port_smollm2_goldens.py compare FOLDER

PADDLE has paddlepaddle 3.3.1 and paddleformers 1.2.0. FOLDER holds links to the model's
files, for PaddleFormers writes a file of its own beside them, and takes all logits to
the second step, which compares them with the course's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "llmlab/chips/ascend_and_other_accelerators/data/smollm2.json"
TEXTS = {
    "plain": "The capital of France is",
    "chat": "<|im_start|>user\nThe capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n",
    # token 0, which a file without pad_token_id makes PaddleFormers' padding
    "after a document": "<|endoftext|>The capital of France is",
}


def in_paddle(folder: Path) -> None:
    """All logits of each text."""
    import paddle
    import paddleformers
    from paddleformers.transformers import LlamaForCausalLM
    from tokenizers import Tokenizer

    model = LlamaForCausalLM.from_pretrained(
        str(folder),
        dtype="float32",
        convert_from_hf=True,
        load_checkpoint_format="flex_checkpoint",
    )
    for layer in [model, *model.sublayers()]:
        if type(layer).__name__ == "RMSNorm":
            layer.config.fuse_rms_norm = False  # it has no kernel on a CPU
    model.eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    logits = {}
    with paddle.no_grad():
        for name, text in TEXTS.items():
            ids = tokenizer.encode(text).ids
            logits[name] = model(input_ids=paddle.to_tensor([ids]))[0].numpy()[0]
        zero = model.model.embed_tokens(paddle.to_tensor([0])).numpy()
    np.savez(folder / "logits.npz", **logits, **{"embedding of 0": zero})
    versions = {"paddlepaddle": paddle.__version__}
    versions |= {"paddleformers": paddleformers.__version__}
    (folder / "versions.json").write_text(json.dumps(versions))


def compare(folder: Path) -> None:
    """Beside the course's model."""
    sys.path.insert(0, str(ROOT))
    import torch
    from tokenizers import Tokenizer

    from llmlab.models import checkpoint

    model = checkpoint.load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stored = np.load(folder / "logits.npz")
    found = {}
    for name, text in TEXTS.items():
        ids = tokenizer.encode(text).ids
        with torch.no_grad():
            ours = model(torch.tensor([ids]))[0].numpy()
        theirs = stored[name]
        top = np.argsort(-theirs[-1])[:10]
        found[name] = {
            "text": text,
            "ids": ids,
            "top ids": top.tolist(),
            "top tokens": [tokenizer.decode([int(i)]) for i in top],
            "top logits": [round(float(x), 4) for x in theirs[-1, top]],
            "largest difference": float(np.abs(ours - theirs).max()),
            "largest logit": float(np.abs(ours).max()),
        }
    data = {
        "versions": json.loads((folder / "versions.json").read_text()),
        "model": "SmolLM2-135M-Instruct",
        "largest embedding of token 0": float(np.abs(stored["embedding of 0"]).max()),
        "texts": found,
    }
    FILE.write_text(json.dumps(data, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    step, folder = sys.argv[1:]
    {"paddle": in_paddle, "compare": compare}[step](Path(folder))
