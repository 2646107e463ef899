# %% [markdown]
# # Solutions: Engine
#
# Three pieces of a build, and then the part's challenge: a scheduler of your own. Symbols are those of the lesson: $H$ query heads share $K$ key/value heads of $D$ channels, $G = H/K$. Stuck? `check.hint("split_qkv")` shows a hint,
# and the next one when it is called again.

# %%
from dataclasses import replace

from torch import Tensor

from llmlab.checks.inference.engine import check
from llmlab.inference.continuous_batching import (
    Job,
    Limits,
    Plan,
    blocks_needed,
    schedule,
)
from llmlab.inference.engine import Row, block_bytes, weight_maps
from llmlab.models.llama import LlamaConfig

# %% [markdown]
# ## Exercise 1: one matrix, three weights
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# A checkpoint holds the weights of q, k and v in one tensor, `packed`, with $(H + 2K)D$ rows; what comes after the first dimension (the input, or nothing for a bias) stays as it is. Two layouts:
#
# - `"stacked"`: all rows of q, then all of k, then all of v.
# - `"grouped"`: $K$ groups, one after the other. A group holds the $G$ query heads that share a key head, then that key head, then its value head, $D$ rows each.
#
# Return q, k and v, with $HD$, $KD$ and $KD$ rows, heads in the order in which they stand. $D$ follows from the rows; `heads` is a multiple of `kv_heads`.


# %% tags=["exercise"]
def split_qkv(
    packed: Tensor, heads: int, kv_heads: int, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q (H·D, …), k (K·D, …) and v (K·D, …) of a packed weight or bias."""
    # BEGIN SOLUTION
    H, K = heads, kv_heads
    D = len(packed) // (H + 2 * K)
    if layout == "stacked":
        q, k, v = packed.split([H * D, K * D, K * D])
        return q, k, v
    groups = packed.unflatten(0, (K, H // K + 2, D))  # (K, G + 2, D, …)
    q = groups[:, :-2].flatten(0, 2)
    return q, groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)
    # END SOLUTION


# %% tags=["check"]
check.split_qkv(split_qkv)

# %% [markdown] tags=["solution"]
# `unflatten` gives the layout its names: first which group, then which head in it, then which channel. After that every part is an index. With $K = H$ a group is q, k, v of one head, the layout of GPT-NeoX. A wrong cut has the right shape and the right numbers in the wrong
# rows, so no error tells; only logits do.

# %% [markdown]
# ## Exercise 2: a new model
# ●●●○○ difficulty · ●●●●● importance · 20 minutes · 4 points
#
# Add Baichuan. Its layers compute what a Llama's do. What differs:
#
# - `model.layers.{}.self_attn.W_pack.weight` holds q, k and v, `"stacked"`. There are no biases.
# - **Baichuan 2** divides each row of `lm_head.weight` by its length, in every pass: `"unit rows"`. The first Baichuan does not. Both have `model_type="baichuan"`; `raw["vocab_size"]` is 125,696 for the second, and something else for the first.
# - All other names are Llama's: `model.embed_tokens.weight`, `model.norm.weight`, and for each layer `input_layernorm`, `post_attention_layernorm`, `self_attn.o_proj`, `mlp.gate_proj`, `mlp.up_proj`, `mlp.down_proj`.
#
# Return rows, `Row(source, targets, how)`: `targets` is a tuple of names in our Llama, `{}` stands for the number of a layer, and `how` is "copy" if it is not given.


# %% tags=["exercise"]
def baichuan_map(raw: dict) -> list[Row]:
    """The weight map of Baichuan 1 and 2; `raw` is the checkpoint's config.json."""
    # BEGIN SOLUTION
    layer = "model.layers.{}."
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    for part in ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj"):
        names.append(f"{layer}{part}.weight")
    for part in ("gate", "up", "down"):
        names.append(f"{layer}mlp.{part}_proj.weight")
    qkv = tuple(f"{layer}self_attn.{x}_proj.weight" for x in "qkv")
    head = "unit rows" if raw["vocab_size"] == 125696 else "copy"
    return [
        *weight_maps.same(*names),
        Row(f"{layer}self_attn.W_pack.weight", qkv, "stacked"),
        Row("lm_head.weight", ("lm_head.weight",), head),
    ]
    # END SOLUTION


# %% tags=["check"]
check.baichuan_map(baichuan_map)

# %% [markdown] tags=["solution"]
# The model is a list of rows; not a line that computes was written. What Baichuan 2 does to its head in every pass is done once here, as a build may. Telling the two apart by the size of the vocabulary is not pretty, but nothing else in the files says it, and vLLM did the same.

# %% [markdown]
# ## Exercise 3: blocks that fit
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# An engine may use `utilisation` of a machine's `memory`. From that share weights and activations come off, and the rest is for the cache. A block holds keys and values of `block_size` tokens in all layers, `value_bytes` for each number. How many whole blocks fit? 0 where nothing is left. The shape
# is in `config`: `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`, `head_dim`, `hidden_size`. Round the share of the memory down to whole bytes.


# %% tags=["exercise"]
def blocks_that_fit(
    memory: int,
    weights: int,
    activations: int,
    config: LlamaConfig,
    block_size: int = 16,
    value_bytes: int = 2,
    utilisation: float = 0.9,
) -> int:
    """Blocks of the cache that the memory has room for; all sizes are in bytes."""
    # BEGIN SOLUTION
    left = int(memory * utilisation) - weights - activations
    return max(0, left // block_bytes(config, block_size, value_bytes))
    # END SOLUTION


# %% tags=["check"]
check.blocks_that_fit(blocks_that_fit)

# %% [markdown] tags=["solution"]
# A token has $2LKD$ numbers: keys and values, of the key heads, in every layer. With $K = H$ it would be more by a factor of $G$, which is what grouped-query attention is for. The share is one of the whole memory: what it leaves is for the driver, for fragments, and for whoever else is there.

# %% [markdown]
# ## Exercise 4, the challenge: a scheduler that wins
# ●●●●● difficulty · ●●●●○ importance · 45 minutes · 6 points
#
# Requests come faster than they can be served for a while, with short prompts and long answers. A step takes 10 ms, and 0.8 ms for each token that it computes; the cache has 120 blocks of 16 tokens, and a step at most 512 tokens of 32 requests. Write the rule that plans each step.
#
# Over two traces it must write at least **288 tokens per second**, and 99% of the times between two tokens of a request must be at most **70 ms**. The rule of the engine, `schedule`, is first come, first served, and does not make it: `challenge.judge(schedule)` says 269 tokens per second and 353 ms.
#
# `running` and `waiting` are lists of `Job(id, computed, left, blocks, own)`: tokens stored, tokens to compute before the next is written (1 when decoding), blocks that it has, blocks that come back when it is sent away. `available` blocks are nobody's. The `Plan` says how many `tokens` each gets, who is `admitted` (they need
# tokens, too), and who is `preempted`: those lose their blocks and compute everything again. `blocks_needed(job, count, block_size)` says what `count` more tokens of a job take. You may call `schedule` itself. `challenge.judge(rule)` shows what a rule reaches; write `from llmlab.inference.continuous_batching import challenge` first.


# %% tags=["exercise"]
def winning_schedule(
    running: list[Job], waiting: list[Job], available: int, limits: Limits
) -> Plan:
    """What the next step computes."""
    # BEGIN SOLUTION
    budget = max(48, len(running))  # a step of 48 tokens takes 48 ms
    reserve = 3  # blocks that everyone who runs will soon want
    plan = schedule(running, [], available, replace(limits, max_tokens=budget))
    if plan.preempted:
        return plan
    by_id = {job.id: job for job in running}
    for id, count in plan.tokens.items():
        available -= blocks_needed(by_id[id], count, limits.block_size)
    left = budget - sum(plan.tokens.values())
    for job in waiting:
        count = min(job.left, left)
        runs = len(running) + len(plan.admitted)
        whole = blocks_needed(job, job.left, limits.block_size)
        if count < 1 or runs == limits.max_sequences:
            break
        if whole + reserve * (runs + 1) > available:
            break
        plan.tokens[job.id] = count
        plan.admitted.append(job.id)
        available -= blocks_needed(job, count, limits.block_size)
        left -= count
    return plan
    # END SOLUTION


# %% tags=["check"]
check.winning_schedule(winning_schedule)

# %% [markdown] tags=["solution"]
# Two things were in the way. A step that reads a long prompt at once makes all who decode wait for it: with at most 48 tokens a step, nobody waits for more than 50 ms. And who admits as many as fit *now* must send some away when they grow, and what those had computed is computed again. Three blocks kept
# for each of those who run are enough: four fifths of the pre-emptions are gone, and with them the work done twice. Keeping more makes requests wait beside an empty cache. vLLM 0.32 has the first as `max_num_batched_tokens`, and the second as `watermark`, a share of the blocks that is kept free when requests are admitted; it is 0 by default.
