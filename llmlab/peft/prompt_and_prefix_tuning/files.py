"""Files of virtual tokens in the format of `peft`: one tensor, `prompt_embeddings`.

A shallow prompt is (p, d), a prefix (p, 2·L·K·D); the encoder's network is not in the
file. A label head, which `peft` keeps with sequence and token classifiers, comes as
`base_model.score.weight` and `.bias`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from llmlab.peft import checkpoint, label_head
from llmlab.peft.prompt_and_prefix_tuning import virtual_tokens

VECTORS = "prompt_embeddings"
HEAD = "base_model.score."
# The settings of peft's that say what the vectors are, or how they began.
READ = (
    "num_virtual_tokens",
    "num_layers",
    "num_attention_heads",
    "token_dim",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "encoder_reparameterization_type",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_dropout",
    "prefix_projection",
    "init_weights",
)
# others must be empty, or as here
PLAIN = {"num_transformer_submodules": 1}
# what peft trains beside the vectors of a classifier; it names each twice
HEADS = {"classifier", "score"}
# by whether each token has a label
TASKS = {None: "CAUSAL_LM", False: "SEQ_CLS", True: "TOKEN_CLS"}


def save(
    model: nn.Module, folder: str | Path, adapter: str, peft_type: str, settings: dict
) -> None:
    """Write what one adapter's encoder gives, and its head."""
    encoder, config = virtual_tokens.get(model, adapter)
    shape, (labels, per_token) = virtual_tokens.shape_of(model), labels_of(encoder)
    tensors = {VECTORS: virtual_tokens.vectors_of(encoder)}
    if labels:
        tensors |= {f"{HEAD}{name}": t for name, t in encoder.head.state_dict().items()}
    common = {
        "peft_type": peft_type,
        "task_type": TASKS[per_token if labels else None],
        "num_virtual_tokens": config.num_virtual_tokens,
        "num_layers": shape.layers,
        "num_attention_heads": (
            shape.heads if encoder.deep else model.config.num_attention_heads
        ),
        "token_dim": shape.heads * shape.head_dim if encoder.deep else shape.d,
        "num_transformer_submodules": 1,
        "inference_mode": True,
        "base_model_name_or_path": checkpoint.base_name(model),
    }
    checkpoint.write(folder, common | settings, tensors, prefix="")


def read(
    model: nn.Module, folder: str | Path, peft_type: str
) -> tuple[dict, virtual_tokens.Table]:
    """(settings, a table of the vectors, with the label head if there is one), checked
    against the sizes of `model`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter; a tensor that is missing, unexpected or of
            the wrong shape (named).
    """
    settings, tensors = checkpoint.read(folder, peft_type, prefix="")
    if set(settings.get("modules_to_save") or ()) <= HEADS:
        settings.pop("modules_to_save", None)
    settings = checkpoint.check_settings(settings, READ, PLAIN, peft_type)
    checkpoint.needed(settings, "num_virtual_tokens")
    shape, deep = virtual_tokens.shape_of(model), peft_type == "PREFIX_TUNING"
    wanted = {
        VECTORS: (settings["num_virtual_tokens"], shape.deep_width if deep else shape.d)
    }
    head = {n.removeprefix(HEAD): t for n, t in tensors.items() if n.startswith(HEAD)}
    if head:
        labels = len(next(iter(head.values())))
        wanted |= {f"{HEAD}weight": (labels, shape.d)} | (
            {f"{HEAD}bias": (labels,)} if "bias" in head else {}
        )
    checkpoint.check_tensors(tensors, wanted)
    table = virtual_tokens.Table(tensors[VECTORS], deep)
    if head:
        table.head = label_head.make_head(shape.d, labels, bias="bias" in head)
        table.head.load_state_dict(head)
    return settings, table.to(virtual_tokens.embedding_of(model).weight.device)


def labels_of(encoder: nn.Module) -> tuple[int | None, bool]:
    """(labels, whether each token has one) of an encoder's head; (None, False) without
    one.
    """
    head = getattr(encoder, "head", None)
    return (None, False) if head is None else (head.out_features, head.bias is not None)
