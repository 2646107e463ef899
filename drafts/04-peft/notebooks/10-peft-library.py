# %% [markdown]
# # The peft library: five methods, ten lines apart
#
# At work you will not write LoRA; you will call `peft`. This page tunes one real model by five methods, moves the results
# between the library and this course, merges one, serves several at once and puts one on a 4-bit base, and says at each
# step which of your earlier lessons is running underneath.

# %%
import json
import tempfile
import warnings
from pathlib import Path

import torch

from llmlab.course import compare, explore, figure, plt, published
from llmlab.models import real_model
from llmlab.models.accounting import parameters
from llmlab.models.llama import Llama
from llmlab.models.presets import preset
from llmlab.peft import ia3, lora, lora_adapters, p_tuning, prefix_tuning, prompt_tuning, walk

# %% [markdown]
# ## What it costs
#
# This is the everyday case, and a good one to have in mind while reading. A service wants answers that a program can read. A small model that was taught to chat gives prose. Fine-tuning fixes
# it, and a fine-tuned copy of the model is a file as large as the model. How large is the part that differs?

# %%
shape = preset("smollm2-135m")
whole = 4 * parameters(shape)
with torch.device("meta"):
    part = 4 * lora.num_parameters(Llama(shape), lora.LoRAConfig(r=8, target_modules=("q_proj", "v_proj")))
print(
    f"the model in fp32: {whole / 1e6:.0f} MB; its LoRA adapter at rank 8: {part / 1e6:.1f} MB, {whole / part:.0f} times less"
)
print(
    f"ten services, ten copies: {10 * whole / 1e9:.1f} GB; one model and ten adapters: {(whole + 10 * part) / 1e9:.2f} GB"
)

# %% [markdown]
# ## Predict
#
# We will show the model eight questions about capitals, each answered by one line of JSON, for eight steps of four
# examples. Then we ask about four countries that it was not shown. **How many of the four answers will be JSON that
# `json.loads` accepts? And how many will still name the right city?** Write down two numbers.

# %% [markdown]
# ## The idea
#
# `peft` wraps a `transformers` model. It looks at the *type* of the settings that you pass, and puts its modules where
# that method wants them. There are only three such places.

# %%
fig, ax = plt.subplots(figsize=(4.8, 3.4))
boxes = [
    (0.5, 0.2, "tokens → embedding", "#0072b2", "Prompt Tuning, P-Tuning:\nrows before the input"),
    (0.5, 1.2, "keys and values", "#00805e", "Prefix, P-Tuning v2:\na prefix in each layer"),
    (0.5, 2.2, "linears", "#d55e00", "LoRA, (IA)³:\nbeside or on a weight"),
]
for x, y, name, color, text in boxes:
    ax.add_patch(plt.Rectangle((x, y), 2.1, 0.7, facecolor="#eceef0", edgecolor=color, linewidth=2))
    ax.text(x + 1.05, y + 0.35, name, ha="center", va="center", color="#22262b")
    ax.text(x + 2.3, y + 0.35, text, ha="left", va="center", color=color)
ax.set(xlim=(0.3, 5), ylim=(0, 3.1))
ax.axis("off")
figure(
    fig,
    alt="Three places in a model. Before the embedded input: Prompt Tuning and P-Tuning. In the keys and values of each layer: "
    "Prefix Tuning and P-Tuning v2. At the linears: LoRA and (IA)³.",
)

# %% [markdown]
# So there are two kinds of adapter in the library, and knowing which is which explains most of its behaviour.
#
# - **Tuners** (LoRA, (IA)³) replace modules inside *your* model. The model object changes. They can merge into the
#   weights, `unload()` takes them out, and several can live in one model side by side.
# - **Prompt learners** (Prompt Tuning, P-Tuning, Prefix Tuning) leave the model alone. `PeftModel.forward` adds virtual
#   tokens on the way in. Nothing can be merged: there is no weight that they change.
#
# In symbols, with $\theta$ the frozen weights and $\phi$ what trains, each minimises the same loss over the answers' tokens,
#
# $$\min_\phi\; -\sum_{t \in \text{answer}} \log p_{\theta,\phi}(x_t \mid x_{<t})$$
#
# and they differ in where $\phi$ enters $p$. The training loop is the same for all; so are saving and loading.

# %% [markdown]
# ## The code
#
# The real model, SmolLM2-135M-Instruct, opens in `transformers` from the folder that `llmlab model fetch` made. Questions
# and answers become rows of tokens; labels of −100 tell the loss to leave the question alone.

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

SHOWN = {"France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Spain": "Madrid"}
SHOWN |= {"Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo", "Cuba": "Havana"}
ASKED = {"Italy": "Rome", "Germany": "Berlin", "Greece": "Athens", "Russia": "Moscow"}


def question(country):
    return f"Capital of {country}?\n"


def batch(pairs):
    """Rows of question + answer, padded on the right, labels on the answer alone."""
    rows = [
        (tokenizer(question(c)).input_ids, tokenizer(json.dumps({"city": x}) + tokenizer.eos_token).input_ids)
        for c, x in pairs.items()
    ]
    width = max(len(q) + len(a) for q, a in rows)
    pad = lambda row, value: row + [value] * (width - len(row))  # noqa: E731
    return {
        "input_ids": torch.tensor([pad(q + a, tokenizer.pad_token_id) for q, a in rows]),
        "labels": torch.tensor([pad([-100] * len(q) + a, -100) for q, a in rows]),
        "attention_mask": torch.tensor([pad([1] * len(q + a), 0) for q, a in rows]),
    }


pairs = list(SHOWN.items())
BATCHES, HELD = [batch(dict(pairs[:4])), batch(dict(pairs[4:]))], batch(ASKED)

# %% [markdown]
# Shapes, for the batch above and the model's width of 576, with 30 layers, 9 query heads and 3 key/value heads of 64:
#
# | what | shape |
# |---|---|
# | `input_ids`, `labels`, `attention_mask` | (4, 13) |
# | virtual tokens of Prompt Tuning and P-Tuning | (8, 576) |
# | a prefix: keys and values of every layer | (8, 2 · 30 · 3 · 64) |
# | LoRA's $A$ and $B$ on `q_proj`; on `v_proj` | (8, 576) and (576, 8); (8, 576) and (192, 8) |
# | (IA)³'s vectors on `k_proj`, `v_proj`, `down_proj` | 192, 192, 1536 |
#
# And this is all the code that training takes. Note what it does *not* contain: anything about the method.


# %%
def tune(config, lr, steps=8):
    """Eight steps of four examples through whatever `config` asks for. Returns the model and its losses."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        loss = model(**BATCHES[step % 2]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


@torch.no_grad()
def held_out(model):
    """The loss on the answers to questions that were not shown."""
    return model(**HELD).loss.item()


@torch.no_grad()
def answers(model):
    """Greedy answers to the held-out questions."""
    asked = tokenizer([question(c) for c in ASKED], return_tensors="pt", padding=True)
    written = model.generate(**asked, max_new_tokens=9, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return [tokenizer.decode(w[asked.input_ids.shape[1] :], skip_special_tokens=True) for w in written]


def is_json(text):
    try:
        return "city" in json.loads(text)
    except (ValueError, TypeError):
        return False


# %% [markdown]
# ## Against the library
#
# On this page the library is the subject, and *our* modules are the judge. First train LoRA with `peft`, and ask before and
# after.

# %%
# NBVAL_IGNORE_OUTPUT
before, first = answers(base), held_out(base)
LM = "CAUSAL_LM"
tuned, losses = {}, {}
tuned["LoRA"], losses["LoRA"] = tune(
    peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type=LM), lr=2e-3
)
after = answers(tuned["LoRA"])
for country, old, new in zip(ASKED, before, after, strict=True):
    print(f"{country:8} before {old!r:38} after {new!r}")
print(f"JSON: {sum(map(is_json, before))} of 4 before, {sum(map(is_json, after))} of 4 after")
print(f"right city: {sum(x in t for x, t in zip(ASKED.values(), after, strict=True))} of 4 after")

# %% [markdown]
# Those are the two numbers that you guessed. The form is learned in eight steps, and it carries over to questions that were
# never shown. Whether the cities are right is another matter: this is a small model, and each step that teaches it the
# form also pushes its memory of geography around. Raise the rate and you will get perfect JSON about the wrong towns.
#
# Now hand the adapter over. `peft` writes a folder; `llmlab.peft` reads it onto its own Llama, with the same weights.

# %%
store = Path(tempfile.mkdtemp())
tuned["LoRA"].save_pretrained(store / "LoRA")
tokens = HELD["input_ids"]
with torch.no_grad():
    theirs = tuned["LoRA"](tokens).logits
    ours = lora_adapters.load(real_model.load(), store / "LoRA").eval()
    compare(ours(tokens), theirs, what="logits, peft's LoRA file in our code", tol=2e-3)

# %% [markdown]
# Merging and unloading. `merge_and_unload` gives back a plain `transformers` model that needs no `peft` to run; the adapter is
# in its weights. `unload` takes the adapter out and leaves the old weights. We use the second here, for we want the base
# again. The merge is done on our side, on the same numbers.

# %%
with torch.no_grad():
    merged = lora.merge_and_unload(ours)
    compare(merged(tokens), theirs, what="logits, merged", tol=2e-3)
    assert not walk.installed(merged, lora.LoRALinear)
base = tuned["LoRA"].unload()
compare(held_out(base), first, what="held-out loss of the base, after unloading", tol=1e-4)

# %% [markdown]
# ## The experiment
#
# The other four methods, on the same eight steps. The only thing that changes from cell line to cell line is the class of
# the settings, and its rate. Rates were chosen beforehand by a short search, method by method: prompts want more than
# weights do.

# %%
held, sizes = {}, {"LoRA": part // 4}
with torch.no_grad():
    held["LoRA"] = torch.nn.functional.cross_entropy(
        theirs[:, :-1].flatten(0, 1), HELD["labels"][:, 1:].flatten(), ignore_index=-100
    ).item()


def through(name, config, lr, ours):
    """Tune, measure, save, and let our own module open the file."""
    model, losses[name] = tune(config, lr)
    held[name], sizes[name] = held_out(model), model.get_nb_trainable_parameters()[0]
    model.save_pretrained(store / name)
    with torch.no_grad():
        theirs = model(tokens).logits[:, -tokens.shape[1] :]  # peft gives logits for its virtual tokens too
        compare(
            ours.load(real_model.load(), store / name)(tokens), theirs, what=f"logits, peft's {name} file", tol=5e-3
        )
    return model


# %%
config = peft.IA3Config(
    target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type=LM
)
base = through("(IA)³", config, 5e-2, ia3).unload()

# %%
config = peft.PromptTuningConfig(
    num_virtual_tokens=8,
    prompt_tuning_init="TEXT",
    prompt_tuning_init_text="Answer in JSON with the key city:",
    tokenizer_name_or_path=str(FOLDER),
    task_type=LM,
)
_ = through("Prompt Tuning", config, 3e-2, prompt_tuning)

# %%
config = peft.PromptEncoderConfig(num_virtual_tokens=8, encoder_hidden_size=64, task_type=LM)
_ = through("P-Tuning", config, 1e-2, p_tuning)

# %%
config = peft.PrefixTuningConfig(num_virtual_tokens=8, encoder_hidden_size=64, prefix_projection=True, task_type=LM)
_ = through("Prefix Tuning", config, 1e-2, prefix_tuning)

# %% [markdown]
# Read the four cells once more and look for what differs. A tuner names modules; a prompt learner names a number of virtual
# tokens; one of them wants the tokenizer, to turn its opening text into tokens. `unload` follows a tuner alone. The loop,
# the optimizer, the loss, the file on disk and the reader are the same. That is what a library is for, and also its danger:
# methods that are so easy to exchange invite one to exchange them without changing the rate.
#
# Five files, five readers, the same logits. The files hold what inference needs and no more: P-Tuning and Prefix Tuning
# train a network that makes their vectors, and it is left behind. That is why the number that trains and the number that is
# kept differ.

# %%
from safetensors.torch import load_file

stored = {
    name: sum(t.numel() for t in load_file(store / name / "adapter_model.safetensors").values()) for name in losses
}
print("method            trained      stored   of the model")
for name in losses:
    print(f"{name:14}{sizes[name]:>11,}{stored[name]:>12,}{stored[name] / parameters(shape):>14.4%}")
assert stored["LoRA"] == sizes["LoRA"] and stored["Prefix Tuning"] < sizes["Prefix Tuning"]

# %%
# NBVAL_IGNORE_OUTPUT
fig, (left, right) = plt.subplots(1, 2, figsize=(4.8, 3.4), width_ratios=[1.4, 1])
for i, name in enumerate(losses):
    left.plot(range(8), losses[name], color=f"C{i}")
    right.barh(name, held[name], color=f"C{i}")
left.set(xlabel="step", ylabel="loss on what is shown", ylim=(0, None))
right.axvline(first, color="#22262b", linewidth=1)
right.set(xlabel="loss on what is asked")
right.invert_yaxis()
right.yaxis.tick_right()
left.set_title("Eight steps")
figure(
    fig,
    alt=f"Left, the loss over eight steps for five methods. Right, the loss on held-out questions, against {first:.1f} before: "
    + ", ".join(f"{name} {held[name]:.1f}" for name in losses)
    + ".",
)
assert held["LoRA"] < first / 2 and held["(IA)³"] < first

# %% [markdown]
# Prompt Tuning has a head start, and honestly so: it begins as the embedding of "Answer in JSON with the key city:", an
# instruction that the model can read. That is the library's best trick for soft prompts, and with 135 million parameters
# it is needed; from noise they learn slowly, as
# [Lester et al. 2021](https://arxiv.org/abs/2104.08691 "lester2021power") found for models below some billions. The two that act on
# weights start exactly at the base's loss, because LoRA's $B$ is 0 and (IA)³'s vectors are 1. The two that go through a
# network start where their random network puts them, and have to find their way back first. In eight steps that matters;
# in eight thousand it does not.

# %% [markdown]
# ## Play
#
# Several adapters live in one model. `load_adapter` adds one, `set_adapter` chooses one, `add_weighted_adapter` mixes, and
# `adapter_names` picks one for each row of a batch. Below, LoRA's adapter is loaded at several strengths; the slider moves
# the strength, and you read how sure the model is of the right answer and of its old one.

# %%
# NBVAL_IGNORE_OUTPUT
many = peft.PeftModel.from_pretrained(base, store / "LoRA", adapter_name="json")
WEIGHTS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5]
loss_at = {}
for w in WEIGHTS:
    many.add_weighted_adapter(["json"], [max(w, 1e-6)], f"at {int(100 * w)}", combination_type="linear")
    many.set_adapter(f"at {int(100 * w)}")
    loss_at[w] = held_out(many)
    many.delete_adapter(f"at {int(100 * w)}")


def draw(weight):
    fig, ax = plt.subplots(figsize=(4.8, 2.8))
    ax.plot(WEIGHTS, [loss_at[w] for w in WEIGHTS], color="#0072b2")
    ax.plot(weight, loss_at[weight], "o", color="#d55e00", markersize=10)
    ax.set(xlabel="weight of the adapter", ylabel="loss on what is asked", ylim=(0, None))
    return fig


explore(
    draw,
    title="How much of the adapter?",
    alt=lambda weight: f"At weight {weight} of the JSON adapter the held-out loss is {loss_at[weight]:.2f}.",
    start={"weight": 1.0},
    weight=WEIGHTS,
)

# %% [markdown]
# And a batch in which each row has its own model: the first goes through the base alone, the second through the adapter.

# %%
many.set_adapter("json")
two = HELD["input_ids"][:1].expand(2, -1)
with torch.no_grad():
    mixed = many(two, adapter_names=["__base__", "json"]).logits
    with many.disable_adapter():
        plain = many(two[:1]).logits
    compare(
        mixed, torch.cat([plain, many(two[:1]).logits]), what="two models in one batch, against each alone", tol=2e-3
    )

# %% [markdown]
# ## At scale
#
# A model that does not fit is loaded in 4 bits, by `bitsandbytes`, and gets its LoRA on top: QLoRA, in one argument. On a GPU
# you would compute in `bfloat16`; on a CPU, fp32 is faster. The footprint tells what is left: the embedding is not
# quantised, and in a small model it is a large part.

# %%
# NBVAL_IGNORE_OUTPUT
from transformers import BitsAndBytesConfig

four = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)
small = AutoModelForCausalLM.from_pretrained(FOLDER, quantization_config=four, dtype=torch.float32)
print(
    f"fp32 {base.get_memory_footprint() / 1e6:.0f} MB, with 4-bit linears {small.get_memory_footprint() / 1e6:.0f} MB"
)
qlora = peft.PeftModel.from_pretrained(small, store / "LoRA")
print(f"held-out loss of the adapter on the fp32 base {held['LoRA']:.2f}, on the 4-bit base {held_out(qlora):.2f}")

# %% [markdown]
# An adapter that was trained on the full base works on the quantised one, a little worse; train it there, and it learns to
# make up for the rounding. The same script runs on eight GPUs with `accelerate launch`: only the adapters' gradients travel.
#
# ```
# accelerate launch --num_processes 8 train.py        # the loop of this page, with accelerator.prepare(model, optimizer)
# ```
#
# The library prints how much it trains; its own documentation gives such numbers for known models. We count them.

# %%
for row in published.rows():
    if row.paper == "mangrulkar2022peft":
        print(
            f"{row.what:54} printed {int(row.published):>10,}   ours {int(row.ours):>10,}   {'same' if row.same else 'no: ' + row.why}"
        )

# %% [markdown]
# ## Takeaways
#
# - Five methods, one training loop: the settings' class is the only difference, and eight steps of four examples are enough
#   to teach a 135M model a form of answer.
# - Tuners (LoRA, (IA)³) change modules, merge at 0 cost, and live side by side; the 3 prompt learners leave the model alone and
#   can never be merged.
# - The file holds less than what trained for the 2 methods that train through a network, and either side, `peft` or
#   `llmlab`, opens what the other wrote.
#
# Now use it yourself: [Exercises](../../work/04-peft/10-peft-library.ipynb).
#
# References: the library, [Mangrulkar et al. 2022](https://github.com/huggingface/peft "mangrulkar2022peft"); soft prompts and scale,
# [Lester et al. 2021](https://arxiv.org/abs/2104.08691 "lester2021power"); (IA)³,
# [Liu et al. 2022](https://arxiv.org/abs/2205.05638 "liu2022fewshot"); 4-bit bases,
# [Dettmers et al. 2023](https://arxiv.org/abs/2305.14314 "dettmers2023qlora").
