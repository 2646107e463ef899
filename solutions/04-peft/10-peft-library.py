# %% [markdown]
# # Solutions: The peft library
#
# Three small jobs with `peft` on a toy Llama of `transformers`: use an adapter and leave no trace, answer a mixed batch, and do
# by hand what the library does with a soft prompt. Stuck? `check.hint("with_adapter")` shows a hint.

# %%
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmlab.checks.peft.peft_library import check

# for matrices this small a second thread waits more than it helps
torch.set_num_threads(1)

# %%
import peft

# %% [markdown]
# ## Exercise 1: use it and leave no trace
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# Load the adapter in `folder` onto `base`, compute the logits of `tokens` with it, and give `base` back as it was: the same
# modules, the same weights. Dropout must be off.


# %% tags=["exercise"]
def with_adapter(base, folder: str, tokens: Tensor) -> Tensor:
    """The logits of `tokens` (n, T) through `base` with the adapter in `folder`: (n, T,
    V). `base` is left as it was.
    """
    # BEGIN SOLUTION
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        logits = model(tokens).logits
    model.unload()
    return logits
    # END SOLUTION


# %% tags=["check"]
check.with_adapter(with_adapter)

# %% [markdown] tags=["solution"]
# `from_pretrained` changes `base` itself: its linears are now LoRA layers. `unload` puts the linears back, untouched;
# `merge_and_unload` would put back linears with other weights. Forget both, and the next adapter lands on top of this one.

# %% [markdown]
# ## Exercise 2: a mixed batch
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# `folders` maps names to adapters. Row $i$ of `tokens` asks for the adapter `names[i]`, or for the plain base where that is
# `None`. Answer all rows in **one** forward pass. (`peft`'s own word for the plain base is `"__base__"`.)


# %% tags=["exercise"]
def mixed_batch(
    base, folders: dict[str, str], tokens: Tensor, names: list[str | None]
) -> Tensor:
    """The logits of each row of `tokens` (n, T) through its own adapter: (n, T, V)."""
    # BEGIN SOLUTION
    first, *others = folders
    model = peft.PeftModel.from_pretrained(base, folders[first], adapter_name=first)
    for name in others:
        model.load_adapter(folders[name], adapter_name=name)
    model.eval()
    with torch.no_grad():
        return model(
            tokens, adapter_names=[name or "__base__" for name in names]
        ).logits
    # END SOLUTION


# %% tags=["check"]
check.mixed_batch(mixed_batch)

# %% [markdown] tags=["solution"]
# The frozen weights are read once for all rows; each adapter's rows go through its thin path together. It works for LoRA
# that is *not* merged, and in evaluation mode only. It is what a server with many customers does.

# %% [markdown]
# ## Exercise 3: a soft prompt by hand
# ●●●○○ difficulty · ●●●○○ importance · 15 minutes · 3 points
#
# A Prompt Tuning folder holds one tensor that matters, `prompt_embeddings` of shape $(p, d)$, in `adapter_model.safetensors`. Do
# without `peft`: put those rows before the embedded tokens of every row, run `base`, and return the logits of the real tokens
# alone.


# %% tags=["exercise"]
def by_hand(base, folder: str, tokens: Tensor) -> Tensor:
    """The logits of `tokens` (n, T) after the soft prompt in `folder`: (n, T, V)."""
    # BEGIN SOLUTION
    # (p, d)
    prompt = load_file(f"{folder}/adapter_model.safetensors")["prompt_embeddings"]
    embedded = base.get_input_embeddings()(tokens)  # (n, T, d)
    rows = torch.cat([prompt.expand(len(tokens), -1, -1), embedded], dim=1)
    with torch.no_grad():
        return base(inputs_embeds=rows).logits[:, len(prompt) :]
    # END SOLUTION


# %% tags=["check"]
check.by_hand(by_hand)

# %% [markdown] tags=["solution"]
# That is the whole of Prompt Tuning at inference: a longer input. Nothing of the model changes, so nothing can be merged, and
# every request pays for $p$ more tokens. `peft` returns the logits of the virtual tokens too; whoever compares must cut
# them off.
