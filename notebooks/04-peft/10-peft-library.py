# %% [markdown]
# # The peft library: five methods, ten lines apart
#
# At work you will not write LoRA; you will call `peft`. This page tunes one real model by five methods with one loop, moves
# the results between the library and this course, serves three models from one batch, merges, and puts an adapter on a
# 4-bit base. At each step it says which of your earlier lessons runs underneath.

# %%
import json
import tempfile
import warnings
from pathlib import Path

import torch

from llmlab.course import compare, explore, figure, plt, predict, show
from llmlab.course.book import published
from llmlab.models import real_model
from llmlab.peft import checkpoint, ia3, lora, p_tuning, walk
from llmlab.peft.lora import files
from llmlab.peft.p_tuning import p_tuning_v2
from llmlab.peft.prompt_and_prefix_tuning import prompt_tuning

# %% [markdown]
# ## What it costs
#
# A service wants answers that a program can read. A small model that was taught to chat gives prose. Fine-tuning changes
# that, and a fine-tuned copy of the model is a file as large as the model. How large is the part that differs?

# %%
# SmolLM2-135M-Instruct as our own Llama, which will judge the library
mine = real_model.load()
whole = 4 * walk.trainable(mine)[1]
part = 4 * lora.num_parameters(
    mine, lora.LoRAConfig(r=8, target_modules=("q_proj", "v_proj"))
)
print(
    f"the model in fp32: {whole / 1e6:.0f} MB; a LoRA adapter of rank 8:"
    f" {part / 1e6:.1f} MB, 1/{whole / part:.0f} of it"
)
print(
    f"ten services, ten copies: {10 * whole / 1e9:.1f} GB; one model, ten adapters:"
    f" {(whole + 10 * part) / 1e9:.2f} GB"
)

# %% [markdown]
# ## Predict
#
# Asked to go on after "The capital of Italy is", the model writes " Rome.", and it knows Berlin, Athens and Moscow too. We
# will show it six *other* capitals, each answered by a line of JSON, `{"city": "Paris"}`: three steps of two
# examples, each seen once, with LoRA. Then we ask for those four.

# %%
form_guess = predict("How many of the four answers will be JSON?", unit="of 4")
city_guess = predict("How many will still name the right city?", unit="of 4")

# %% [markdown]
# ## The idea
#
# `peft` wraps a `transformers` model. It looks at the *type* of the settings that you pass, and puts its modules where that
# method wants them. For our five methods there are only three such places.

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(4.8, 3.4))
boxes = [
    (
        0.5,
        0.2,
        "tokens → embedding",
        "#0072b2",
        "Prompt Tuning, P-Tuning:\nrows before the input",
    ),
    (
        0.5,
        1.2,
        "keys and values",
        "#00805e",
        "Prefix, P-Tuning v2:\nrows in every layer",
    ),
    (0.5, 2.2, "linears", "#d55e00", "LoRA, (IA)³:\nbeside or on a weight"),
]
for x, y, name, color, text in boxes:
    ax.add_patch(
        plt.Rectangle(
            (x, y), 2.1, 0.7, facecolor="#eceef0", edgecolor=color, linewidth=2
        )
    )
    ax.text(x + 1.05, y + 0.35, name, ha="center", va="center", color="#22262b")
    ax.text(x + 2.3, y + 0.35, text, ha="left", va="center", color=color)
ax.set(xlim=(0.3, 5), ylim=(0, 3.1))
ax.axis("off")
figure(
    fig,
    alt=(
        "Three places in a model. Before the embedded input: Prompt Tuning and"
        " P-Tuning. In the keys and values of every layer: Prefix Tuning and P-Tuning"
        " v2. At the linears: LoRA and (IA)³."
    ),
)

# %% [markdown]
# So there are two kinds of adapter in the library, and knowing which is which explains most of its behaviour.
#
# - **Tuners** (LoRA, (IA)³) replace modules inside *your* model object. They can merge into the weights, `unload()` takes
#   them out again, and several can live in one model side by side.
# - **Prompt learners** (Prompt Tuning, P-Tuning, Prefix Tuning) leave the model alone. `PeftModel.forward` adds virtual
#   tokens on the way in. Nothing can be merged: there is no weight that they change.
#
# In symbols, with $\theta$ the frozen weights and $\phi$ what trains, each minimises the same loss over the answers' tokens,
#
# $$\min_\phi\; -\sum_{t \in \text{answer}} \log p_{\theta,\phi}(x_t \mid x_{<t})$$
#
# and they differ in where $\phi$ enters $p$. So the training loop is the same for all, and so are saving and loading.

# %% [markdown]
# ## The code
#
# `transformers` opens the model from the folder that `llmlab model fetch` made. Questions and answers become rows of
# tokens; a label of −100 tells the loss to leave a token alone.

# %%
import peft
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=UserWarning)
logging.disable_progress_bar()
logging.set_verbosity_error()

FOLDER = real_model.path()
tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)

SHOWN = {"France": "Paris", "Japan": "Tokyo", "Spain": "Madrid", "Kenya": "Nairobi"}
SHOWN |= {"Norway": "Oslo", "Cuba": "Havana"}
ASKED = {"Italy": "Rome", "Germany": "Berlin", "Greece": "Athens", "Russia": "Moscow"}


def question(country):
    return f"The capital of {country} is"


def batch(pairs, form):
    """Rows of question + answer, padded on the right, labels on the answer alone."""

    def ids(text):
        return tokenizer(text).input_ids

    rows = [
        (ids(question(c)), ids(form.replace("CITY", city) + tokenizer.eos_token))
        for c, city in pairs
    ]
    width = max(len(q) + len(a) for q, a in rows)

    def pad(row, value):
        return row + [value] * (width - len(row))

    return {
        "input_ids": torch.tensor(
            [pad(q + a, tokenizer.pad_token_id) for q, a in rows]
        ),
        "labels": torch.tensor([pad([-100] * len(q) + a, -100) for q, a in rows]),
        "attention_mask": torch.tensor([pad([1] * len(q + a), 0) for q, a in rows]),
    }


def pairs_of(form):
    """The six examples in three batches of two."""
    shown = list(SHOWN.items())
    return [batch(shown[i : i + 2], form) for i in range(0, len(shown), 2)]


JSON, XML = ' {"city": "CITY"}', " <city>CITY</city>"
BATCHES, HELD = pairs_of(JSON), batch(list(ASKED.items()), JSON)
print(
    "a batch:",
    tuple(BATCHES[0]["input_ids"].shape),
    "  held out:",
    tuple(HELD["input_ids"].shape),
)

# %% [markdown]
# Shapes, for the model's width of 576, its 30 layers, 9 query heads and 3 key/value heads of 64:
#
# | what | shape |
# |---|---|
# | `input_ids`, `labels`, `attention_mask` | (2, 12 or 13) |
# | virtual tokens of Prompt Tuning and P-Tuning | (10, 576) |
# | a prefix: keys and values of every layer | (10, 2 · 30 · 3 · 64) |
# | LoRA's $A$ and $B$ on `q_proj`; on `v_proj` | (8, 576) and (576, 8); (8, 576) and (192, 8) |
# | (IA)³'s vectors on `k_proj`, `v_proj`, `down_proj` | 192, 192, 1536 |
#
# This is all the code that training takes. Note what it does *not* contain: anything about the method.


# %%
def fit(model, batches, lr):
    """Train what `peft` left trainable, once through the batches. Returns the
    losses.
    """
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )
    losses = []
    for rows in batches:
        loss = model(**rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def answer_loss(logits):
    """The loss on the answers to the four questions that are not shown."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), HELD["labels"][:, 1:].flatten()
    ).item()


# %% [markdown]
# And these are the five methods. Each has its own learning rate, searched for once, outside this page, with this loop:
# rates a factor of two apart, three seeds where the start is random, judged by the loss on four more countries (Denmark,
# Portugal, Hungary, Thailand). For every method, half of its rate and twice its rate were worse.

# %%
LM = "CAUSAL_LM"
METHODS = {
    "LoRA": (
        peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type=LM
        ),
        8e-3,
    ),
    "(IA)³": (
        peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type=LM,
        ),
        4e-2,
    ),
    "Prompt Tuning": (
        peft.PromptTuningConfig(
            num_virtual_tokens=10,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text='Answer in JSON: {"city": "London"}',
            tokenizer_name_or_path=str(FOLDER),
            task_type=LM,
        ),
        2e-2,
    ),
    "P-Tuning": (
        peft.PromptEncoderConfig(
            num_virtual_tokens=10, encoder_hidden_size=64, task_type=LM
        ),
        5e-3,
    ),
    "P-Tuning v2": (
        peft.PrefixTuningConfig(
            num_virtual_tokens=10, init_weights="zero", task_type=LM
        ),
        0.2,
    ),
}
READERS = {
    "LoRA": files,
    "(IA)³": ia3,
    "Prompt Tuning": prompt_tuning,
    "P-Tuning": p_tuning,
    "P-Tuning v2": p_tuning_v2,
}

# %% [markdown]
# Read the five once more and look for what differs. A tuner names modules; a prompt learner names a number of virtual
# tokens; one of them wants the tokenizer, to turn its opening text into tokens. Prefix Tuning is the last class with
# `prefix_projection=True`, which trains the prefix through a network.
#
# What `save_pretrained` writes is as plain: a folder with one file of settings and one of tensors. This is our half.

# %%
show(checkpoint.write)

# %% [markdown]
# ## Against the library
#
# On this page the library is the subject, and *our* modules are the judge. For each method: train with `peft`, save, open
# the folder on our own Llama, and compare logits. Then our side writes the adapter down again, and the two folders must
# hold the same tensors under the same names, so that `peft` can open ours as well.

# %%
from safetensors.torch import load_file

store, tokens = Path(tempfile.mkdtemp()), HELD["input_ids"]
losses, held, trained, stored = {}, {}, {}, {}


def handed_over(name, theirs):
    """Save with peft, open with ours, save with ours: the logits, and the tensors of
    both folders.
    """
    module = READERS[name]
    theirs.save_pretrained(store / name)
    module.load(mine, store / name)
    with torch.no_grad():
        logits = mine(tokens[:1])
    module.save(mine, store / f"{name} by ours")
    (lora if name == "LoRA" else module).remove(mine)
    return logits, *(
        load_file(store / folder / checkpoint.TENSORS)
        for folder in (name, f"{name} by ours")
    )


with torch.no_grad():
    plain, first = mine(tokens[:1]), answer_loss(base(tokens).logits)

for name, (config, lr) in METHODS.items():
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    trained[name] = model.get_nb_trainable_parameters()[0]
    losses[name] = fit(model, BATCHES, lr)
    with torch.no_grad():
        # peft gives logits for its virtual tokens too
        theirs = model(tokens).logits[:, -tokens.shape[1] :]
    held[name] = answer_loss(theirs)
    ours, file, again = handed_over(name, model)
    stored[name] = sum(t.numel() for t in file.values())
    compare(
        ours, theirs[:1], what=f"{name}: logits, peft's folder in our code", tol=2e-3
    )
    assert file.keys() == again.keys() and all(
        torch.equal(file[n], again[n]) for n in file
    )
    if not config.is_prompt_learning:
        model.unload()  # a tuner sits in `base`: take it out again

with torch.no_grad():
    compare(
        mine(tokens[:1]),
        plain,
        what="our base after five adapters came and went",
        tol=0,
    )
    compare(
        answer_loss(base(tokens).logits),
        first,
        what="the library's base: held-out loss as before",
        tol=0,
    )

# %% [markdown]
# Five folders and five readers give the same logits. Now look at the sizes. A file holds what inference needs and no more: P-Tuning
# trains a network that makes its vectors, and the network stays behind.

# %%
print("method            trained      stored   of the model")
for name in METHODS:
    print(
        f"{name:14}{trained[name]:>11,}{stored[name]:>12,}"
        f"{4 * stored[name] / whole:>14.4%}"
    )
assert (
    stored["LoRA"] == trained["LoRA"] == part // 4
    and stored["P-Tuning"] < trained["P-Tuning"]
)

# %% [markdown]
# ## The experiment
#
# What did three steps do?

# %% tags=["nbval-ignore-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(4.8, 3.4), width_ratios=[1.4, 1])
for i, name in enumerate(losses):
    left.plot(range(3), losses[name], "o-", markersize=3, color=f"C{i}")
    right.barh(name, held[name], color=f"C{i}")
left.set(xlabel="step", xticks=range(3), ylabel="loss on what is shown", ylim=(0, None))
right.axvline(first, color="#22262b", linewidth=1)
right.text(first, 4.55, "before ", ha="right", va="bottom", color="#22262b")
right.set(xlabel="on what is asked", xlim=(0, 5), xticks=[0, 2, 4], ylim=(-0.5, 5.1))
right.invert_yaxis()
right.yaxis.tick_right()
left.set_title("Three steps of two")
right.set_title("Then")
figure(
    fig,
    alt=(
        "Left, the loss over three steps for five methods. Right, the loss on held-out"
        f" questions, {first:.1f} before: "
    )
    + ", ".join(f"{name} {held[name]:.1f}" for name in losses)
    + ".",
)
assert (
    max(held["LoRA"], held["(IA)³"], held["Prompt Tuning"]) < first / 4
    and held["P-Tuning"] > first / 2
)

# %% [markdown]
# LoRA and (IA)³ start exactly at the base's loss, since LoRA's $B$ is 0 and (IA)³'s vectors are 1, and fall at once. Prompt
# Tuning keeps up, and honestly so: it begins as the embedding of `Answer in JSON: {"city": "London"}`, a prompt that a
# person could have typed. That is the library's best trick for soft prompts. From noise they learn slowly on models of this
# size, as [Lester et al. 2021](https://arxiv.org/abs/2104.08691 "lester2021power") found below some billions of parameters.
# P-Tuning shows it: its network starts at random, acts on the input only, and three steps take it almost nowhere. Left alone
# for 21 steps, off this page, it came down to 0.6.
#
# P-Tuning v2 starts a little *above* the base, with `init_weights="zero"`, which the library's documentation calls a
# no-op. It is not quite one: a key of zero still gets its share of the softmax, and a value of zero
# then dilutes the rest. Its variant with a network depended on luck: at a rate of 0.004 the loss on the search's four
# countries after three steps was 2.2, 5.8 and 1.9 for three seeds.
#
# Now to your two numbers, and to what adapters are for. We load the LoRA folder *that our code wrote*, add a second adapter
# which learns XML from the same six pairs, and ask all three models in **one batch**: rows of `__base__` go through the
# plain weights, the others through their own adapter.

# %% tags=["nbval-ignore-output"]
many = peft.PeftModel.from_pretrained(base, store / "LoRA by ours", adapter_name="json")
torch.manual_seed(0)
many.add_adapter("xml", METHODS["LoRA"][0])
many.set_adapter("xml")
fit(many, pairs_of(XML), METHODS["LoRA"][1])


def ask(model, adapters, new=8):
    """Greedy answers to the four questions from each adapter, all rows in one call of
    `generate`.
    """
    rows = tokenizer(
        [question(c) for c in ASKED] * len(adapters), return_tensors="pt", padding=True
    )
    names = [adapter for adapter in adapters for _ in ASKED]
    written = model.generate(
        **rows,
        adapter_names=names,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    text = tokenizer.batch_decode(
        written[:, rows.input_ids.shape[1] :], skip_special_tokens=True
    )
    return {adapter: text[4 * i : 4 * i + 4] for i, adapter in enumerate(adapters)}


def is_json(text):
    try:
        return "city" in json.loads(text)
    except (ValueError, TypeError):
        return False


said = ask(many, ["__base__", "json", "xml"])
for i, country in enumerate(ASKED):
    print(
        f"{country:8}" + "".join(f"{said[a][i].partition(chr(10))[0]:26}" for a in said)
    )
right = {
    a: sum(city in text for city, text in zip(ASKED.values(), said[a], strict=True))
    for a in said
}
print(
    f"JSON: {sum(map(is_json, said['__base__']))} of 4 before,"
    f" {sum(map(is_json, said['json']))} of 4 after"
)
print(
    f"right city: {right['__base__']} of 4 before, {right['json']} after,"
    f" {right['xml']} in XML"
)
form_guess.settle(sum(map(is_json, said["json"])))
city_guess.settle(right["json"])

# %% [markdown]
# The form is learned from six examples and carries over to questions that were never shown. The price is in the last line: the
# answers are well-formed and often about the wrong town. Nothing in the loss protected what the model knew; six cities were
# shown, each for its form, and each step pushed the memory of the others around. On a model of this size, a service
# that checks only the format would call this a success.
#
# One caution about that batch. Rows with their own adapters work for LoRA that is *not* merged, and not in training.
# Merging is for the case of one adapter: the weights take it in, and it costs nothing at inference.

# %%
many.set_adapter("json")
weights = {n: p.clone() for n, p in many.named_parameters() if "base_layer" in n}
with torch.no_grad():
    apart = many(tokens[:1]).logits
    many.merge_adapter(["json"])
    compare(
        many(tokens[:1]).logits,
        apart,
        what="logits, merged by peft against not merged",
        tol=2e-3,
    )
    many.unmerge_adapter()
    moved = [
        (p - weights[n]).abs().max().item()
        for n, p in many.named_parameters()
        if n in weights
    ]
    files.load(mine, store / "LoRA")
    lora.merge(mine)
    compare(mine(tokens[:1]), apart, what="logits, merged by ours", tol=2e-3)
    lora.unmerge(mine)
    lora.remove(mine)
    compare(mine(tokens[:1]), plain, what="our base, unmerged", tol=0)
print(
    f"peft's base, unmerged: the same bits? {max(moved) == 0}; within 1e-6?"
    f" {max(moved) < 1e-6}"
)

# %% [markdown]
# `peft` unmerges by subtracting $\Delta W$, which rounds; ours keeps the old weight and puts it back. A difference in the eighth
# decimal is harmless once. Do not merge and unmerge in a loop, and with a half-precision base prefer to reload.

# %% [markdown]
# ## Play
#
# An adapter can be turned down or up: `rescale_adapter_scale` multiplies its $\Delta W$ for a moment, and `add_weighted_adapter`
# makes a mixture of several for good. Here is the JSON adapter at five strengths. Move the slider and watch what the model
# wants to say next after "The capital of Italy is".

# %% tags=["hide-input", "nbval-ignore-output"]
from peft.helpers import rescale_adapter_scale

WEIGHTS = [0.0, 0.2, 0.4, 0.6, 1.0]
italy = tokenizer(question("Italy"), return_tensors="pt").input_ids
chance = {}
for w in WEIGHTS:
    with torch.no_grad(), rescale_adapter_scale(many, w):
        chance[w] = many(italy).logits[0, -1].softmax(-1)
likely = torch.stack(list(chance.values())).amax(0).topk(6).indices.tolist()
likely.sort(key=lambda t: -chance[0.0][t])
share = {
    w: {repr(tokenizer.decode([t]))[1:-1].strip(): chance[w][t].item() for t in likely}
    for w in WEIGHTS
}


def draw(weight):
    fig, ax = plt.subplots(figsize=(4.8, 2.8))
    colors = [
        "#d55e00" if "{" in word else "#0072b2" if word == "Rome" else "#b8bcc2"
        for word in share[weight]
    ]
    ax.barh(list(share[weight]), list(share[weight].values()), color=colors)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="probability of the next token")
    ax.set_title(f"The capital of Italy is …  (adapter × {weight:g})")
    return fig


explore(
    draw,
    title="How much of the adapter?",
    alt=lambda weight: (
        f"At weight {weight:g} of the JSON adapter: "
        + ", ".join(f"{word} {p:.0%}" for word, p in share[weight].items())
        + "."
    ),
    start={"weight": 0.4},
    weight=WEIGHTS,
)

# %% [markdown]
# ## At scale
#
# A model that does not fit is loaded in 4 bits, by `bitsandbytes`, and gets its LoRA on top: QLoRA, in one argument. On a GPU
# you would compute in `bfloat16`; on a CPU, fp32 is faster. The embedding is not quantised, and in a small model it is
# most of what is left.

# %% tags=["nbval-ignore-output"]
from transformers import BitsAndBytesConfig

four = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
small = AutoModelForCausalLM.from_pretrained(
    FOLDER, quantization_config=four, dtype=torch.float32
)
table = 4 * base.get_input_embeddings().weight.numel()
print(
    f"fp32: {whole / 1e6:.0f} MB; 4-bit linears:"
    f" {small.get_memory_footprint() / 1e6:.0f} MB, of which {table / 1e6:.0f}"
    " embedding"
)
with torch.no_grad():
    quantised = answer_loss(
        peft.PeftModel.from_pretrained(small, store / "LoRA").eval()(tokens).logits
    )
print(
    f"held-out loss of the LoRA adapter: on the fp32 base {held['LoRA']:.2f}, on the"
    f" 4-bit base {quantised:.2f}"
)

# %% [markdown]
# An adapter that was trained on the full base works on the quantised one, at a higher loss. Trained on the 4-bit base itself, by
# the same three steps and from the same start, off this page, it came down to 0.47, as low as on the full base: it learns
# around the rounding. For eight GPUs wrap model and optimizer in `accelerator.prepare`; the gradients that travel are those of
# the adapters alone.
#
# ```
# accelerate launch --num_processes 8 train.py
# ```
#
# The library prints how much it trains, and its documentation gives such numbers for known models. We count them again.

# %%
for row in published.rows():
    if row.paper == "mangrulkar2022peft":
        verdict = "same" if row.same else f"no: {row.why}"
        print(
            f"{row.what.removeprefix('peft: '):48} printed {int(row.published):>9,} "
            f" ours {int(row.ours):>9,}  {verdict}"
        )

# %% [markdown]
# <details><summary>For the curious: what these libraries do where one would guess otherwise</summary>
#
# If your run trains fewer numbers than you thought, or answers differently after a merge, look here. Seen with peft 0.21, transformers 5.23 and
# bitsandbytes 0.50 on a CPU; a test of the project runs each line.
#
# | what you write | one would guess | what happens |
# |---|---|---|
# | `LoraConfig()` on a Llama | every linear | `q_proj` and `v_proj`, rank 8, and alpha 8, so a factor of 1 |
# | `target_modules="all-linear"` | the head, too | all linears but the head |
# | LoRA on a base in bf16 | adapters in bf16 | adapters in fp32 |
# | `load_in_4bit=True` alone | NF4, as in QLoRA | FP4, without double quantization |
# | `merge_and_unload()` on a 4-bit base | weights in floats | 4 bits again, so all is rounded a second time |
# | `load_in_8bit=True`, on a CPU | LLM.int8 ([Dettmers et al. 2022](https://arxiv.org/abs/2208.07339 "dettmers2022int8")): weights and inputs in 8 bits, outliers apart | that in `eval()`; in `train()` only the weights are in 8 bits |
#
# So say what you mean in the settings, count what trains, and measure in the mode and in the form that you will serve. (On an Nvidia GPU `train()` takes the way
# of `eval()`; we read that in the source and did not run it.) The folded cell runs what is quick.
#
# </details>

# %% tags=["hide-cell"]
from bitsandbytes.nn import Linear8bitLt

usual = peft.LoraConfig()
print(
    f"LoraConfig: r={usual.r}, alpha={usual.lora_alpha}, {usual.lora_dropout} dropout"
)
asked = BitsAndBytesConfig(load_in_4bit=True)
print(
    f"load_in_4bit: {asked.bnb_4bit_quant_type}, double quantization"
    f" {asked.bnb_4bit_use_double_quant}"
)

torch.manual_seed(0)
linear, x = torch.nn.Linear(64, 32, bias=False).half(), torch.randn(4, 64).half()
x[0, 3] = 60  # an outlier
eight = Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=6.0)
eight.load_state_dict(linear.state_dict())
with torch.no_grad():
    for mode in ("train", "eval"):
        for threshold in (0.0, 6.0):
            eight.train(mode == "train").state.threshold = threshold
            off = (eight(x) - linear(x)).abs().max().item()
            print(f"8 bits, {mode + '()':<9} threshold {threshold:g}: off by {off:.2f}")

# %% [markdown]
# ## What to keep
#
# ```python
# config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
# model = peft.get_peft_model(base, config)                # freezes the base
# train(model)                                             # one loop for all five methods
# model.save_pretrained(folder)                            # settings, and the tensors that trained
# model = peft.PeftModel.from_pretrained(new_base, folder)
# model = model.merge_and_unload()                         # tuners only
# ```
#
# Five methods, one loop: the settings' class and a learning rate are all that differs, and the best rates lie a factor of
# 40 apart, from 0.005 for P-Tuning to 0.2 for a prefix. The 2 tuners (LoRA, (IA)³) change modules, merge at no cost, and
# live side by side, three models in one batch; the 3 prompt learners leave the model alone and can never be merged. Six
# examples teach a 135M model a form, 4 of 4; they also cost it facts, so measure both.
#
# **Use it** for any model of `transformers`, and to exchange adapters with others as small folders. **Not** to merge and
# unmerge in a loop: it unmerges by subtracting, which rounds, so with a half-precision base reload instead.
#
# <details><summary>Which two kinds of adapter does the library have?</summary>
#
# Tuners replace modules inside your model and can merge. Prompt learners add virtual tokens on the way in, and have no
# weight to merge into.
#
# </details>
#
# <details><summary>What does save_pretrained write?</summary>
#
# One file of settings and one of the tensors that inference needs. Nothing of the base is in it, and P-Tuning's network
# stays behind.
#
# </details>
#
# <details><summary>When can the rows of one batch use different adapters?</summary>
#
# With LoRA that is not merged, and not in training. Rows of `__base__` go through the plain weights.
#
# </details>
#
# Now use it yourself: [Exercises](../../work/04-peft/10-peft-library.ipynb).
#
# References: the library, [Mangrulkar et al. 2022](https://github.com/huggingface/peft "mangrulkar2022peft"); soft prompts and
# scale, [Lester et al. 2021](https://arxiv.org/abs/2104.08691 "lester2021power"); P-Tuning v2,
# [Liu et al. 2022](https://arxiv.org/abs/2110.07602 "liu2022ptuning"); (IA)³,
# [Liu et al. 2022](https://arxiv.org/abs/2205.05638 "liu2022fewshot"); 4-bit bases,
# [Dettmers et al. 2023](https://arxiv.org/abs/2305.14314 "dettmers2023qlora").
