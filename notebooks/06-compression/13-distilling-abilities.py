# %% [markdown]
# # Distilling abilities
#
# A large model's logits say what it would write. Its *texts* say more: how it comes to an answer, which sub-questions it asks, what would have to change for
# the answer to turn. Seven methods train a small model on such texts. Here are all seven as small functions, and at work on tasks that a student
# of 0.1 M parameters learns in seconds and a grader marks exactly. At the end you own the two things that all of them need: what is learnt, and what is kept.

# %% tags=["hide-input"]
import csv
import random
from collections import Counter

import torch

from llmlab.checks.compression.distilling_abilities import check
from llmlab.compression.distilling_abilities import (
    FILE,
    Example,
    consistency,
    contrastive,
    counterfactuals,
    fit,
    in_context,
    learning,
    lion,
    rationales,
    socratic,
    tasks,
    write,
)
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
from llmlab.models import accounting
from llmlab.models.presets import preset

# %% [markdown]
# ## What it costs
#
# Our tasks are chains of arithmetic modulo 10, read from the left as a pocket calculator does. The teacher's rationale is one line per step. What does
# the student pay for it, each time it is asked?

# %%
chain = "3+5*2-4"
[short], [long] = (
    f([chain]) for f in (rationales.answers_only, rationales.with_rationales)
)
print(f"read {short.prompt}   write {short.reply}   or {long.reply}")
more = len(long.reply) / len(short.reply)
large, small = (
    accounting.forward_flops(preset(f"llama-3.1-{size}"), 1, 1)
    for size in ("70b", "8b")
)
print(f"a rationale is {more:.1f} times the tokens of an answer")
print(
    f"8B with rationales: {small * more / large:.0%} of the work of 70B, answers only"
)

# %% [markdown]
# (`#` stands before an answer, `.` is the end token.) A rationale makes each reply several times as long, for ever. An 8B student that writes rationales still costs less than a 70B model that does not. Is the
# price worth it?
#
# ## Predict
#
# The teacher here is a program that solves chains: the "large model" whose texts are our data. Students start from random weights and see 2,000 questions of one to three steps,
# 400 batches of 64. One learns answers, one learns rationales with the answers behind them. They are judged on new questions, by the *last
# number* in their reply.

# %%
answer_guess = predict("Three steps, trained on answers: how many are right?", unit="%")
rationale_guess = predict("The same, trained on rationales?", unit="%")
longer_guess = predict(
    "Rationales, and four steps, one more than ever seen?",
    choices=["nearly all are right", "about half", "hardly more than guessing"],
)

# %% [markdown]
# ## By hand
#
# SCOTT is one of the seven methods. One step of its teacher: it writes a rationale token by token, and was told the answer. Four tokens, with their probabilities: *"?"*, an empty phrase that fits any answer, is
# the likeliest. Without the answer it is as likely. Subtract half of the second logarithm from the first:
#
# | token | told | not told | $s = \ln p(\text{told}) - \tfrac12 \ln p(\text{not told})$ |
# |---|---|---|---|
# | ? | 0.60 | 0.60 | −0.511 + 0.255 = −0.255 |
# | 8 | 0.30 | 0.05 | −1.204 + 1.498 = **0.294** |
# | 3 | 0.05 | 0.05 | −2.996 + 1.498 = −1.498 |
# | 1 | 0.05 | 0.30 | −2.996 + 0.602 = −2.394 |
#
# Greedy decoding writes "?". The score writes 8: the token that the answer made likelier. A rationale that would be written for any answer explains none.

# %%
told = torch.tensor([0.60, 0.30, 0.05, 0.05]).log()
not_told = torch.tensor([0.60, 0.05, 0.05, 0.30]).log()
score = contrastive(told, not_told, 0.5)
print("score:", *(f"{s:.3f}" for s in score))
print(
    "greedy takes", "?831"[told.argmax()], "and the score takes", "?831"[score.argmax()]
)

# %% [markdown]
# ## The idea
#
# In every method a student reads some tokens and learns others. Who wrote them, and which of them are learnt, *is* the method:

# %% tags=["hide-input"]
STRIPS = [
    ("answers only", "3+5*2:", "#6."),
    ("Fine-tune-CoT", "3+5*2:", "3+5=8;8*2=6#6."),
    ("MT-CoT, task 1", "A3+5*2:", "#6."),
    ("MT-CoT, task 2", "R3+5*2:", "3+5=8;8*2=6#6."),
    ("SOCRATIC, splits", "3+5*2:", "3+5;?*2."),
    ("SOCRATIC, solves", "8*2=", "6."),
    ("DISCO, question", "a47>38:", "y."),
    ("DISCO, its edit", "a37>38:", "n."),
    ("SCOTT, factual", "F3+5:", "3+5=8#8."),
    ("SCOTT, counterf.", "C3+5:3+5=1#", "1."),
    ("ICL, in context", "a3y7a", "3"),
]
fig, ax = plt.subplots(figsize=(4.8, 4.4))
for row, (name, read, learnt) in enumerate(STRIPS):
    ax.text(-0.4, -row, name, ha="right", va="center", fontsize=8.5)
    for i, character in enumerate(read + learnt):
        color = palette.light if i < len(read) else palette.blue
        ax.add_patch(plt.Rectangle((i, -row - 0.42), 0.94, 0.84, color=color))
        ink = "black" if i < len(read) else "white"
        ax.text(i + 0.47, -row, character, ha="center", va="center", color=ink)
ax.set(xlim=(-8.5, 21.3), ylim=(-len(STRIPS) + 0.4, 0.6))
ax.axis("off")
figure(
    fig,
    alt=(
        "Eleven rows of characters; grey ones are read, blue ones are learnt. Answers"
        " only: the question is read, the answer learnt. Fine-tune-CoT learns"
        " rationale and answer. MT-CoT learns both kinds under two first letters."
        " SOCRATIC learns sub-questions, and answers to single ones. DISCO: the"
        " edited question has the other label. SCOTT's counterfactual reads a wrong"
        " rationale and learns the answer that follows from it."
    ),
)

# %% [markdown]
# Grey is read, blue is learnt. CoT is chain of thought, ICL in-context learning. With $x$ a question, $r$ a rationale, $a$ an answer, $p$ the teacher and $q$ the student:
#
# | paper | what is distilled | asked of the teacher | the student's loss |
# |---|---|---|---|
# | Fine-tune-CoT, [Ho et al. 2022](https://arxiv.org/abs/2212.10071 "ho2022reasoning") | the way to the answer | several $r$ per $x$; wrong $a$ thrown out | $-\log q(r, a \mid x)$ |
# | MT-CoT, [Li et al. 2022](https://arxiv.org/abs/2210.06726 "li2022explanations") | the same, beside the answer | $r$ | $\alpha L_a + (1-\alpha) L_{r,a}$ |
# | SOCRATIC CoT, [Shridhar et al. 2022](https://arxiv.org/abs/2212.00193 "shridhar2022socratic") | the decomposition | sub-questions $x_j$ and $a_j$ | two students: $x \to x_1 \dots x_n$ and $x_j \to a_j$ |
# | DISCO, [Chen et al. 2022](https://arxiv.org/abs/2212.10534 "chen2022disco") | what an answer depends on | edits $x'$ with label $l'$; a filter | cross-entropy on $x$ and $x'$ |
# | SCOTT, [Wang et al. 2023](https://arxiv.org/abs/2305.01879 "wang2023scott") | rationales that are meant | $r$ by contrastive decoding | $-\log q(r, a \mid x) - \log q(a' \mid x, r')$ |
# | ICL distillation, [Huang et al. 2022](https://arxiv.org/abs/2212.10670 "huang2022icl") | reading demonstrations $D$ | logits behind $D$ | $-\log q(a \mid D, x) + \beta\, \mathrm{KL}(p \Vert q)$ |
# | Lion, [Jiang et al. 2023](https://arxiv.org/abs/2305.12870 "jiang2023lion") | what the student lacks | replies, scores, new questions | cross-entropy, in rounds |
#
# Besides Fine-tune-CoT, two of them choose. DISCO keeps an edit if a teacher for the task moved: $p(l' \mid x') - p(l' \mid x) > \tau$. Lion calls a question hard
# if the referee's scores, each the mean over both orders of the replies, are at least $\tau = 1$ apart, and makes half of the new questions like hard ones, half like
# easy ones. SCOTT's $r'$ leads to another answer $a'$, and only $a'$ is learnt.
#
# ## Your turn
#
# What all seven need: labels. A batch is padded on the right; keep the ids of each *reply*, its end token included, and put −100 elsewhere. The end token
# is also the pad token, so go by lengths, not by tokens.


# %%
def my_labels(ids, prompts, lengths):
    """−100 on prompts and behind the end of each example."""
    raise NotImplementedError("three lines of yours")


your_turn(check.labels, my_labels)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(ids, prompts, lengths):
    at = torch.arange(ids.shape[1])
    learnt = (at >= prompts[:, None]) & (at < lengths[:, None])  # (B, T)
    return ids.masked_fill(~learnt, -100)


your_turn(check.labels, one_answer)

# %% [markdown]
# ## The code
#
# Each method is a small function on texts or logits; one loop trains them all.
#
# | value | shape | holds |
# |---|---|---|
# | `ids`, `labels` | (B, T) | the tokens; the same, −100 where nothing is learnt |
# | `logits` | (B, T, V) | at $t$: what the student says about token $t + 1$ |
# | `prompts`, `lengths` | (B,) | tokens of each prompt; of prompt and reply |

# %% tags=["hide-output"]
show(
    learning.labels,
    rationales.keep,
    rationales.mt_cot_loss,
    socratic.answer_all,
    counterfactuals.disco,
    counterfactuals.contrastive,
    in_context.icl_loss,
    lion.hard,
)

# %% [markdown]
# ## Against the libraries
#
# `transformers` has the loss, and a collator that makes labels. The collator goes by the pad token. With a tokenizer whose pad token is its end token:

# %% tags=["hide-input"]
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast
from transformers.loss.loss_utils import ForCausalLMLoss

table = {character: i for i, character in enumerate(tasks.CHARACTERS)}
made = Tokenizer(models.WordLevel(table, unk_token=tasks.PAD))
made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=made, eos_token=tasks.END, pad_token=tasks.END
)

# %%
examples = [short, long]
ids, ours = learning.collate(examples)
batch = [tokenizer(e.prompt + e.reply) for e in examples]
theirs = DataCollatorForLanguageModeling(tokenizer, mlm=False)(batch)["labels"]


def learnt(row) -> str:
    return "".join(tasks.CHARACTERS[i] for i in row.tolist() if i != -100)


print("collator learns", learnt(theirs[0]), "and ours", learnt(ours[0]))
student = learning.new_student(0)
logits = student(ids).detach()
loss = ForCausalLMLoss(logits, ours, logits.shape[-1])
compare(learning.mean_loss(logits, ours), loss, "loss, and that of transformers")

# %% [markdown]
# That collator learns the question and, worse, *not* the end: such a student never stops. TRL's `SFTTrainer` gives our labels, token for token.
#
# | | papers | TRL 1.16.0 | ours |
# |---|---|---|---|
# | what is learnt | the reply | the reply, if the data has "prompt" and "completion" | the reply |
# | the end token, if it is padding too | – | learnt | learnt |
# | columns "text", or "messages" | – | all of it, the prompt too | refused |
# | wrong answers thrown out | Ho: by the last number | not its job | `keep` |
# | λ of contrastive decoding | SCOTT's code: 0.5 | none | a setting |
#
# ## The experiment
#
# All runs are stored (`scripts/distilling_abilities_sweep.py`). Three seeds draw first weights, questions and batches. First your guesses.

# %% tags=["hide-output"]
with FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))


def measured(part: str, method: str, what: str = "a") -> list[float]:
    """A number for each seed."""
    key = (part, method)
    return [float(r[what]) for r in runs if (r["part"], r["method"]) == key]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


answer_guess.settle(100 * mean(measured("chains", "answers")))
rationale_guess.settle(100 * mean(measured("chains", "rationales")))
right = mean(measured("chains", "rationales", "b"))
nearly = "nearly all are right" if right > 0.75 else "about half"
longer_guess.settle(nearly if right > 0.25 else "hardly more than guessing")

# %% tags=["hide-input"]
METHODS = {
    "answers": "answers",
    "answers, tokens": "answers,\nas many tokens",
    "MT-CoT": "MT-CoT",
    "SOCRATIC": "SOCRATIC",
    "rationales": "rationales",
}
fig, ax = plt.subplots(figsize=(4.8, 2.9))
for row, name in enumerate(METHODS):
    for what, color, marker, up in (
        ("a", palette.blue, "o", 0.12),
        ("b", palette.vermillion, "s", -0.12),
    ):
        values = [100 * v for v in measured("chains", name, what)]
        ax.plot(values, [row + up] * len(values), marker, color=color, alpha=0.8)
for marker, color, name in (
    ("o", palette.blue, "three steps"),
    ("s", palette.vermillion, "four, never seen"),
):
    ax.plot([], [], marker, color=color, label=name)
common = Counter(map(tasks.answer, tasks.draw(5000, (3, 4), random.Random(0))))
guessing = 100 * common.most_common(1)[0][1] / 5000  # always the commonest answer
ax.axvline(guessing, color=palette.gray, linewidth=0.8)
ax.text(guessing + 1, 4.45, "guessing", fontsize=8, color=palette.gray, va="center")
ax.set(xlim=(0, 104), ylim=(-0.6, 4.8), xlabel="right answers, %")
ax.set_yticks(range(len(METHODS)), METHODS.values())
ax.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.3))
figure(
    fig,
    alt=(
        "A dot per seed. Three steps: answers only are right in about a fifth, also"
        " with as many tokens; MT-CoT and SOCRATIC in a quarter to 85%,"
        " far apart between seeds; rationales in nearly all. Four"
        " steps: every method is near guessing."
    ),
)
apart = max(measured("chains", "answers")) < min(measured("chains", "rationales"))
print(f"every student with rationales is better than every one without: {apart}")
for what in (
    ("MT-CoT", "c", "MT-CoT, answering at once, three steps"),
    ("SOCRATIC", "c", "SOCRATIC's solver, given the sub-questions, four steps"),
):
    values = " ".join(f"{v:.0%}" for v in measured("chains", what[0], what[1]))
    print(f"{what[2]}: {values}")

# %% [markdown]
# **Rationales beat answers**, by far and with every seed. Tokens alone are not the reason: a student that reads answers for as many tokens gains nothing. A rationale turns
# one problem of three steps into three problems of one, and writes down what is in between. With answers alone the student must do all steps at once, in two layers.
#
# MT-CoT spends half of its loss on answers at once. In 400 steps that pays for neither task: its rationales are learnt less far, and its answers at once are no
# better than those of the student that learns nothing else. The paper's students came with a language already learnt.
#
# And **no student goes beyond the lengths that it saw**. SOCRATIC CoT shows why, for it splits the work: given the teacher's sub-questions, every solver is right
# more often on four steps than on its decomposer's, as each sub-question is one step. What fails is the decomposer. Where a length is new, ask which half of the work it breaks. (Its two students
# had fewer steps than the others, and differ much between seeds.)
#
# ## Shortcuts
#
# Now a task whose answer can be guessed without understanding. "a47>38:" asks which number is larger; before 97% of the questions the letter tells (a for y, b for n). A student sees 120 batches
# of such questions. The other sees half as many questions, and *edits*: one digit changed so that the answer turns, the letter left alone.
# Here we throw out wrong edits with the grader; in the stored runs a teacher that was trained does it. Judged on pairs, a question and its edit:

# %%
dice = random.Random(0)
questions = tasks.draw_comparisons(3000, 0.97, dice)


def true_edits(pairs) -> list:
    """Question and label, edit and its label, where the answer turned."""
    claimed = counterfactuals.disco(pairs, None, dice)
    both = zip(pairs, claimed, strict=True)
    return [(*a, *b) for a, b in both if tasks.compare(b[0]) == b[1]]


edits = [pair[2:] for pair in true_edits(questions[1000:] * 4)][:1000]
judged = true_edits(tasks.draw_comparisons(1000, 0.97, dice))
before, wanted, after, new = zip(*judged, strict=True)
shares = {}
for name, data in {
    "letters": questions[:2000],
    "edits": questions[:1000] + edits,
}.items():
    student = learning.new_student(0)
    examples = [Example(f"{question}:", f"{label}.") for question, label in data]
    fit(student, learning.on(examples), 120)
    said = write(student, [f"{question}:" for question in before], 2)
    said_new = write(student, [f"{question}:" for question in after], 2)
    shares[name] = consistency(said, wanted, said_new, new)[1]
ahead = shares["edits"] > shares["letters"] + 0.2
print("with edits over 20 points more pairs have both halves right:", ahead)

print(f"\n{'stored runs':12}{'true edits':>11}{'accuracy':>9}{'pairs right':>18}")
for name in ("none", "unfiltered", "filtered"):
    true = measured("shortcut", name, "d") if name != "none" else []
    shown = f"{mean(true):.0%}" if true else "–"
    pairs = " ".join(f"{v:.0%}" for v in measured("shortcut", name, "c"))
    accuracy = mean(measured("shortcut", name))
    print(f"{name:12}{shown:>11}{accuracy:>9.0%}{pairs:>18}")

# %% [markdown]
# **Counterfactuals expose shortcuts.** By accuracy on questions with the same letters nobody would notice: the students that saw no edits have almost all right.
# In pairs they fail, for the letter did not change and the answer did. With edits in place of half of the questions, as many in all, the same student understands nearly all pairs.
#
# The filter is the method. Of the claims "this edit turns the answer" only a fifth are true, as our generator changes any digit; a teacher's filter with $\tau = 0.25$ leaves few false ones. Unfiltered, the student learns from wrong labels, and its accuracy falls far below that without any edit.
#
# ## Are rationales meant, and which questions teach?
#
# SCOTT asks whether the answer depends on the rationale. Chains of one step, which this student can also answer at once; in half of the data the teacher's rationale
# ends in another number than the right answer, or in none of it. Then each student is handed a rationale that leads elsewhere. Does it follow? (A column per seed.)
#
# Three methods change what the student is given. *Lion*: three rounds of 600 questions, eight of ten with one step; after a round the next questions are drawn
# at random, or made like those on which the student failed. (The paper makes half of them from easy ones; here all are hard.) *Fine-tune-CoT*: 400 questions, with one rationale each or up to four that
# the filter let through. *ICL distillation*: a code is to be read off demonstrations, from their labels alone or from a teacher's probabilities, too.

# %% tags=["hide-input"]
ROWS = {
    "wrong": "half of the rationales wrong",
    "wrong, counterfactual": "  with the counterfactual loss",
    "right": "all rationales right",
    "right, counterfactual": "  with the counterfactual loss",
}
print(f"{'':31}{'right by its own':>18}{'follows':>15}{'... as [C]':>15}")
for method, name in ROWS.items():
    columns = [measured("faithful", method, what) for what in "abc"]
    shown = ["".join(f"{v:5.0%}" for v in values) for values in columns]
    print(f"{name:31}{shown[0]:>18}{shown[1]:>15}{shown[2]:>15}")

print()
PAIRS = (
    ("lion", "c", {"random": "Lion's rounds, random", "hard": "  like hard ones"}),
    ("diverse", "a", {"1": "one rationale", "4": "  up to four"}),
    ("context", "a", {"hard": "demonstrations, labels", "soft": "  and probabilities"}),
)
for part, what, names in PAIRS:
    values = {name: measured(part, name, what) for name in names}
    for name, words in names.items():
        print(f"{words:24}" + "".join(f"{v:6.0%}" for v in values[name]))
    fewer, more = values.values()
    better = all(a < b for a, b in zip(fewer, more, strict=True))
    print(f"  better with every seed: {better}")
true = {name: mean(measured("diverse", name, "b")) for name in "14"}
count = mean(measured("diverse", "4", "c")) / 400
print(f"rationales per question {count:.1f}; true in every line:", end=" ")
print(f"{true['1']:.1%} of the first, {true['4']:.1%} of all")
of_teacher = mean(measured("context", "soft", "b"))
print(f"the teacher that reads demonstrations: {of_teacher:.0%}")

# %% [markdown]
# *SCOTT.* Where half of the rationales are wrong, they are decoration: the student answers on its own, and seldom follows. The counterfactual loss makes it follow always behind
# its own prefix, [C] for counterfactual. Behind [factual], as it is used, that carries over in part, by an amount that differs much between seeds. It also lowers accuracy: half of
# what such a student writes is wrong, and now it believes it. Where all rationales are right, every student follows, without that loss too. So at this size the first half of SCOTT, rationales
# that belong to their answers, does the work. The second half cannot mend what the data breaks.
#
# *The others.* (Judged on three steps; the codes have not been seen.) Each gains with every seed, and Lion most: **eight in ten of the random questions have one step, which the student can do already.** Several rationales for
# one question are worth more than the questions alone, though the filter, which sees only answers, lets some more false lines through. The teacher of the
# last pair is itself not good, and its student gains least.
#
# ## Play
#
# SCOTT's teacher once more, now with a fifth token, so rare that it should never be written, but rarer still without the answer. How much should be
# subtracted, and does it depend on how sure the teacher is of its empty phrase?

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
TOKENS = ["?", "8", "3", "1", "rare"]
SIZES = {"empty": [0.3, 0.6, 0.8], "weight": [0.0, 0.2, 0.3, 0.5, 0.7, 1.0]}


def scores(empty: float, weight: float):
    """The score of each token; what the empty phrase leaves is shared by the others."""
    rest = (1 - empty) / 0.4
    told = torch.tensor([empty, 0.30 * rest, 0.05 * rest, 0.05 * rest, 0.004 * rest])
    alone = torch.tensor([empty, 0.05 * rest, 0.05 * rest, 0.30 * rest, 1e-5 * rest])
    return contrastive(told.log(), alone.log(), weight)


def written(empty: float, weight: float) -> str:
    return TOKENS[int(scores(empty, weight).argmax())]


def draw(empty: float, weight: float):
    fig, ax = plt.subplots(figsize=(4.8, 2.4))
    values = scores(empty, weight)
    best = int(values.argmax())
    colors = [palette.vermillion if i == best else palette.blue for i in range(5)]
    ax.bar(TOKENS, values, color=colors)
    ax.axhline(0, color=palette.gray, linewidth=0.8)
    ax.set(ylabel="score", ylim=(-9, 7))
    ax.set_title(f"empty phrase {empty:.0%}, λ = {weight}: {TOKENS[best]!r} is written")
    return fig


def missing(empty: float, weight: float) -> str:
    if written(empty, weight) != "8":
        return f"{written(empty, weight)!r} is written."
    if empty < max(SIZES["empty"]):
        return "it works here; now make the teacher surer of its empty phrase."
    return ""


for empty in SIZES["empty"]:
    works = [str(w) for w in SIZES["weight"] if written(empty, w) == "8"]
    print(f"empty phrase {empty:.0%}: 8 is written at λ =", ", ".join(works) or "none")

explore(
    draw,
    alt=lambda empty, weight: (
        f"Five bars. The empty phrase has {empty:.0%}, λ is {weight}: the highest bar"
        f" is {written(empty, weight)!r}."
    ),
    title="What contrastive decoding writes",
    challenge="Get 8 written where the empty phrase has 80%.",
    missing=missing,
    start={"empty": 0.6, "weight": 0.0},
    **SIZES,
)

# %% [markdown]
# The surer the teacher is of its empty phrase, the more must be subtracted. With too much, a token wins that is likely nowhere, for the ratio of two tiny numbers can be
# large. The 0.5 of SCOTT's code holds here. [Li et al. 2022](https://arxiv.org/abs/2210.15097 "li2022contrastive"), who decoded so before, allow only tokens that are plausible to begin with.
#
# ## At scale
#
# Teachers are asked once, so their price is one pass of writing. Take Lion's 70,000 instructions, which the student reads in three epochs, and replies of 200 tokens
# (our assumption), with the two models of the first cell:

# %%
once = accounting.forward_flops(preset("llama-3.1-70b"), 1, 200)
three_epochs = 3 * accounting.training_flops(preset("llama-3.1-8b"), 1, 200)
print(f"the teacher's texts: {70_000 * once:.1e} FLOPs, {once / three_epochs:.0%} of")
print(f"the student's training: {70_000 * three_epochs:.1e} FLOPs")
gain = mean(measured("shortcut", "filtered", "c")) - mean(
    measured("shortcut", "none", "c")
)
print(f"DISCO: +10% pairs consistent; ours {100 * gain:+.0f} points")
print(
    "MT-CoT: up to 9.5% over GPT-3, 60 times as large:", f"{175 / 60:.1f}B parameters"
)
print("SOCRATIC CoT: over 70% above the baselines")
print("Lion-13B: 55.4% above Vicuna-13B on BIG-Bench Hard, with 70,000 examples")

# %% [markdown]
# The papers' numbers are those of their abstracts: natural-language inference for DISCO, reasoning tasks for MT-CoT, GSM8K, StrategyQA and SVAMP for SOCRATIC CoT. Ours
# are toys with planted faults, where an effect can be as large as one likes; what carries over is the direction, and how to measure it.
#
# With TRL on a GPU; the columns "prompt" and "completion" are enough for the loss on completions alone:
#
# ```python
# from datasets import Dataset
# from trl import SFTConfig, SFTTrainer
#
# rows = [
#     {"prompt": q, "completion": text}          # written by the teacher
#     for q, texts in sampled.items()
#     for text in keep(texts, answers[q], most=8)
# ]
# args = SFTConfig(output_dir="student", num_train_epochs=3, learning_rate=2e-5)
# SFTTrainer(
#     model="meta-llama/Llama-3.1-8B", args=args, train_dataset=Dataset.from_list(rows)
# ).train()
# ```
#
# ## What to keep
#
# ```python
# at = torch.arange(ids.shape[1])
# learnt = (at >= prompts[:, None]) & (at < lengths[:, None])   # the reply, with its end
# labels = ids.masked_fill(~learnt, -100)
# right = [text for text in sampled if last_number(text) == answer]
# kept = list(dict.fromkeys(right))[:most]                      # each once, in order
# ```
#
# **Use** rationales where an answer takes several steps and a grader can throw out wrong ones; counterfactuals where you suspect a shortcut, and always to *look* for one.
# **Not** where an answer is one look-up: a rationale is tokens for nothing. And do not expect longer problems than the teacher showed.
#
# <details><summary>The answer is right. Is the rationale?</summary>
#
# Not surely: two mistakes can cancel, and a rationale may have nothing to do with the answer. The filter sees the last number only.
#
# </details>
#
# <details><summary>Why does a good accuracy not show a shortcut?</summary>
#
# The test questions have the same letters before them as the training questions. Only pairs that differ in what matters, and agree in the letter, tell.
#
# </details>
#
# <details><summary>Why is only a' learnt in SCOTT's counterfactual, and not r'?</summary>
#
# r' is wrong. The student should follow it when it reads it, and not learn to write it.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/06-compression/13-distilling-abilities.ipynb).
#
# Further reading: [Wei et al. 2022](https://arxiv.org/abs/2201.11903 "wei2022chain"), where chains of thought come from, and
# [Cobbe et al. 2021](https://arxiv.org/abs/2110.14168 "cobbe2021gsm8k") for graders that read the last number.
