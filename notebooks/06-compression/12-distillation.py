# %% [markdown]
# # Distillation
#
# Pruning and quantization keep a model and make it smaller. Distillation trains another one: a small *student* learns from what a
# large *teacher* says about every token. Which of two directions the student is pulled in, and on whose texts, decides what it becomes.
# At the end you own the loss that turns from one direction to the other.

# %% tags=["hide-input"]
import csv
import itertools
import math

import torch
import torch.nn.functional as F

from llmlab.checks.compression.distillation import check
from llmlab.compression.distillation import (
    MiniLLMConfig,
    divergences,
    gkd,
    hinton,
    kl,
    minillm,
    training,
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
from llmlab.models import accounting, course_model
from llmlab.models.llama import Llama
from llmlab.models.presets import preset

# %% [markdown]
# ## What it costs
#
# What a token costs to write, with a large model and with a small one of the same family:

# %%
for name in ("llama-3.1-70b", "llama-3.1-8b"):
    size = accounting.weight_bytes(preset(name)) / 1e9
    work = accounting.forward_flops(preset(name), 1, 1) / 1e9
    print(f"{name:14} {size:4.0f} GB in 16 bits, {work:4.0f} GFLOP per token")

# %% [markdown]
# About nine times less of both, for each token that will ever be written. The small model exists already. The question is how much of
# the large one can be put into it.
#
# ## Predict
#
# First a drawing. The teacher's distribution has two peaks far apart, one with 60% of the probability and one with 40%. The student is a
# single bell. It is fitted by the **reverse KL**, which asks: *what the student writes, would the teacher write it?*
#
# Then language. The teacher is the course model; a new student has the shape of the draft model, a quarter of its size. It reads 150
# batches of text, once with the next token as its label, once with all the teacher's probabilities for the next token.

# %%
peak_guess = predict(
    "Where does the bell go?",
    choices=["between the peaks, wide", "onto the 60% peak", "onto the 40% peak"],
)
soft_guess = predict(
    "By how much is held-out perplexity lower with the teacher's probabilities?",
    unit="%",
)

# %% [markdown]
# ## By hand
#
# Four tokens. The teacher is torn between the first and the last: $p = (0.48, 0.02, 0.02, 0.48)$. Two students: one is *even*, 0.25 for each,
# one has *picked* a side, $(0.94, 0.02, 0.02, 0.02)$. A divergence is $\mathrm{KL}(a \Vert b) = \sum_v a_v \ln (a_v / b_v)$: $a$ decides which
# tokens count.
#
# | | $\mathrm{KL}(p \Vert q)$, forward | $\mathrm{KL}(q \Vert p)$, reverse |
# |---|---|---|
# | even | 2 · 0.48 ln(0.48/0.25) + 2 · 0.02 ln(0.02/0.25) = **0.525** | 2 · 0.25 ln(0.25/0.48) + 2 · 0.25 ln(0.25/0.02) = 0.937 |
# | picked | 0.48 ln(0.48/0.94) + 0.48 ln(0.48/0.02) = 1.203 | 0.94 ln(0.94/0.48) + 0.02 ln(0.02/0.48) = **0.568** |
#
# Forward prefers the even student: to leave out a token that the teacher likes is dear, 0.48 ln 24. Reverse prefers the one that picked: to
# write what the teacher would not is dear, and to leave out half is cheap.

# %%
p = torch.tensor([0.48, 0.02, 0.02, 0.48])
students = {"even": [0.25] * 4, "picked": [0.94, 0.02, 0.02, 0.02]}
for name, q in students.items():
    q = torch.tensor(q)
    forward, reverse = kl(p.log(), q.log()), kl(q.log(), p.log())
    print(f"{name:7} forward {forward:.3f}  reverse {reverse:.3f}")

# %% [markdown]
# ## The idea
#
# The same with bells. Of all bells, a few thousand, the one with the smallest divergence, in either direction:

# %% tags=["hide-cell"]
# The bells, and your guess.
x = torch.linspace(-8, 8, 161)


def bell(mean, width) -> torch.Tensor:
    return (-0.5 * ((x - mean) / width) ** 2).log_softmax(-1)


def two_peaks(distance: float) -> torch.Tensor:
    left, right = bell(-distance / 2, 0.5), bell(distance / 2, 0.5)
    return torch.logaddexp(left + math.log(0.6), right + math.log(0.4))


means, widths = torch.meshgrid(
    torch.linspace(-3, 3, 61), torch.linspace(0.3, 4, 75), indexing="ij"
)
means, widths = means.flatten(), widths.flatten()
bells = bell(means[:, None], widths[:, None])


def best(distance: float, beta: float) -> int:
    """Which of the bells is nearest to the teacher."""
    teacher = two_peaks(distance).expand_as(bells)
    return int(divergences.jsd(teacher, bells, beta).argmin())


forward, reverse = best(4, 0), best(4, 1)
sides = ["onto the 60% peak", "between the peaks, wide", "onto the 40% peak"]
peak_guess.settle(sides[int(means[reverse].sign()) + 1 if widths[reverse] < 1 else 1])

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(4.8, 2.6))
ax.fill_between(x, two_peaks(4).exp(), color=palette.light, label="teacher")
ax.plot(x, bells[forward].exp(), color=palette.blue, label="forward KL")
ax.plot(x, bells[reverse].exp(), color=palette.vermillion, label="reverse KL")
ax.set(xlim=(-6, 6), yticks=[], xlabel="what is written")
ax.legend(fontsize=9)
figure(
    fig,
    alt=(
        "Two peaks, the left one higher. The forward bell is low and wide and covers"
        " both, highest in the valley between them. The reverse bell is narrow and"
        " lies on the left peak alone, higher than it."
    ),
)
valley = (x - means[forward]).abs() < 1
for name, i in {"forward": forward, "reverse": reverse}.items():
    share = bells[i].exp()[valley].sum()
    print(
        f"{name}: mean {means[i]:.1f}, width {widths[i]:.1f}, in the valley {share:.0%}"
    )
print(f"teacher: in the valley {two_peaks(4).exp()[valley].sum():.0%}")

# %% [markdown]
# **Forward KL covers, reverse KL picks.** A student that is too small for both peaks must choose: write what the teacher never would, or
# leave out what it would. The words come from the weights in the sum: $p$ in one, $q$ in the other.
#
# **Soft labels** ([Hinton et al. 2015](https://arxiv.org/abs/1503.02531 "hinton2015distilling")) are the forward direction on given
# texts. Both softmaxes get a temperature $T$, so that the small probabilities can be seen. The gradient shrinks like $1/T^2$, hence a factor:
#
# $$L = \alpha\, T^2\, \mathrm{KL}\big(p^{(T)} \Vert q^{(T)}\big) + (1-\alpha)\, \mathrm{CE}(y, q)$$
#
# $$T^2 \frac{\partial\, \mathrm{KL}}{\partial z_i} = T\, (q_i - p_i) \to \frac{(z_i - \bar z) - (v_i - \bar v)}{V} \ (T \to \infty)$$
#
# so that at high $T$ the student's logits $z$ copy the teacher's $v$. Without the logits, one can train on texts that the teacher wrote
# ([Kim & Rush 2016](https://arxiv.org/abs/1606.07947 "kim2016sequence")).
#
# **GKD** ([Agarwal et al. 2023](https://arxiv.org/abs/2306.13649 "agarwal2023gkd")) adds two dials. A share $\lambda$ of the texts is written by the
# *student*, so that it learns to go on from its own mistakes; nothing is differentiated through the sampling. And the divergence turns:
#
# $$D_\beta = \beta\, \mathrm{KL}(p \Vert m) + (1-\beta)\, \mathrm{KL}(q \Vert m), \qquad m = \beta p + (1-\beta) q$$
#
# Both ends of the formula are 0. But $D_\beta / \beta \to \mathrm{KL}(p \Vert q)$ as $\beta \to 0$, and $D_\beta / (1 - \beta) \to \mathrm{KL}(q \Vert p)$ as
# $\beta \to 1$. So the ends *are* the KLs, by agreement.
#
# **MiniLLM** ([Gu et al. 2023](https://arxiv.org/abs/2306.08543 "gu2023minillm")) takes the reverse KL of *whole texts*. Then a token is also to blame
# for what follows it, and the gradient is a policy gradient with the reward $r_t = \log p - \log q$. Token $t$ itself is summed over the
# vocabulary, and only the rest, divided by its length, is left to luck:
#
# $$\nabla L = -\,\mathbb{E}_{y \sim \tilde p} \sum_t w_t \Big[ \nabla \sum_v q_v \log \frac{p_v}{q_v} + R_{t+1} \nabla \log q(y_t) \Big], \qquad
# w_t \approx \frac{q(y_t)}{\tilde p(y_t)}, \quad \tilde p = \alpha p + (1-\alpha) q$$
#
# ## Your turn
#
# The divergence that turns. Logits of teacher and student, (B, V) each; return $D_\beta$ of each row, (B,), with the forward KL at $\beta = 0$ and
# the reverse KL at $\beta = 1$.


# %%
def jsd(teacher_logits, student_logits, beta: float):
    """The generalised Jensen–Shannon divergence; its ends are the KLs."""
    raise NotImplementedError("seven lines of yours")


your_turn(check.jsd, jsd)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(teacher_logits, student_logits, beta):
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


your_turn(check.jsd, one_answer)

# %% [markdown]
# ## The code
#
# A method is a function of logits and a mask; the loop is the same for all.
#
# | value | shape | holds |
# |---|---|---|
# | `teacher_logits`, `student_logits` | (B, T, V) | at $t$: what they say about token $t + 1$; the teacher's are constants |
# | `tokens` | (B, T) | what stands there |
# | `mask` | (B, T) | 1 for a token of the reply, 0 for prompt and padding |

# %% tags=["hide-output"]
show(divergences.jsd, hinton.soft_loss, gkd.loss, minillm.loss, training.distil)

# %% [markdown]
# ## Against mathematics and the libraries
#
# PyTorch has the KL, with the student first. The wide bell has a closed form: it has the mean and the variance of the teacher. And MiniLLM's
# estimator can be tried on *all* texts of a language of three tokens and length three, each with its probability, against the gradient of the
# true reverse KL.

# %%
torch.manual_seed(0)
v, z = torch.randn(2, 6, 50).unbind()
log_p, log_q = v.log_softmax(-1), z.log_softmax(-1)
theirs = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
compare(divergences.jsd(v, z, 0).mean(), theirs, "β = 0, and F.kl_div(log q, log p)")
theirs = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
compare(divergences.jsd(v, z, 1).mean(), theirs, "β = 1, and F.kl_div(log p, log q)")
probability = two_peaks(4).exp()
mean = (probability * x).sum()
width = (probability * (x - mean) ** 2).sum().sqrt()
found = [means[forward], widths[forward]]
compare(found, [mean, width], "forward bell, and moments", tol=0.06)  # bells 0.1 apart

# %% tags=["hide-input"]
texts = torch.tensor(list(itertools.product(range(3), repeat=3)))  # all 27
table_p, table_q = torch.randn(2, 13, 3, dtype=torch.float64).unbind()
table_q.requires_grad_()  # a row of logits for each of the 13 beginnings
a, b, _ = texts.unbind(1)
rows = torch.stack([0 * a, 1 + a, 4 + 3 * a + b], dim=1)


def of_texts(logits) -> torch.Tensor:
    return minillm.of_tokens(logits.log_softmax(-1), texts)  # (27, 3)


def gradient(loss) -> torch.Tensor:
    return torch.autograd.grad(loss, table_q)[0]


true = gradient(kl(of_texts(table_q[rows]).sum(-1), of_texts(table_p[rows]).sum(-1)))


def off_by(alpha: float, weights: str) -> float:
    """How far the estimator's mean is from the true gradient, relative to it."""
    config = MiniLLMConfig(alpha, weights, length_norm=False)
    q, p = (of_texts(table[rows]).detach().exp() for table in (table_q, table_p))
    total = 0
    for i, drawn in enumerate((alpha * p + (1 - alpha) * q).prod(-1)):
        logits = (table_p[rows[i : i + 1]], table_q[rows[i : i + 1]])
        one = texts[i : i + 1]
        total += drawn * gradient(
            minillm.loss(*logits, one, torch.ones_like(one), config)
        )
    return float((total - true).norm() / true.norm())


print(f"its own texts                     off by {off_by(0.0, 'token'):4.0%}")
for weights, name in {
    "exact": "each reward its own product",
    "prefix": "the product w_t, as derived",
    "token": "its last factor, as used",
}.items():
    print(f"mixed texts, {name:28} {off_by(0.2, weights):9.0%}")

# %% [markdown]
# On the student's own texts the mean of the estimator is the gradient. On mixed texts, as derived in the paper, it is not: the rewards lie *after* $t$, and
# the product up to $t$ does not reweigh them. To keep its last factor only adds little to that. (Teacher and student are strangers
# here; the closer they are, the less any weight matters.)

# %% tags=["hide-cell"]
# Paper, library, ours. TRL's values are those of 1.16.0 with transformers 5.24:
# student (0.5, 0.5), teacher (0.9, 0.1).
teacher, student = (torch.tensor([q]).log() for q in ([0.9, 0.1], [0.5, 0.5]))
in_trl = {0: "0.3681", 0.001: "0.00037", 0.1: "0.0336", 0.5: "0.1017"}
in_trl |= {0.999: "0.0005", 1: "0.5108"}
for beta, value in in_trl.items():
    ours = divergences.jsd(teacher, student, beta).item()
    print(f"D at β = {beta:<6} TRL {value:8} ours {ours:.5f}")
rows_of = [
    ("", "paper", "TRL 1.16.0", "ours"),
    ("β = 0", "limit: KL(p‖q)", "KL(p‖q)", "KL(p‖q)"),
    ("T²", "Hinton: yes", "no", "soft_loss only"),
    ("T in the divergence", "a setting", "never set *", "a setting"),
    ("mean over", "a reply's tokens", "all reply tokens", "all reply tokens"),
    ("without a mask", "–", "divides by replies", "needs a mask"),
    ("MiniLLM, length", "T − t − 1", "removed", "T − t"),
]
for row in rows_of:
    print(f"{row[0]:20}" + "".join(f"{cell:>20}" for cell in row[1:]))
print("* GKDTrainer samples at its temperature, 0.9, and compares at 1")

# %% [markdown]
# ## The experiment
#
# First labels. Ten steps here, to see the loop; the runs that are judged have 150 and are stored (`scripts/distillation_sweep.py`; three seeds
# draw the first weights and the text). Judged on 128 held-out pieces of text.

# %% tags=["numbers-within-5%"]
teacher = course_model.load()
torch.manual_seed(0)
student = Llama(course_model.load_draft().config)
windows = course_model.tokens("train")[: 10 * 16 * 64].view(10, 16, 64)
batches = [training.Batch(w, training.reply_mask(w, 1), 1) for w in windows]


def soft(a: training.Aligned):
    return hinton.soft_loss(a.teacher_logits, a.student_logits, a.mask)


config = training.DistilConfig(lr=3e-3)
losses = training.distil(student, teacher, batches, soft, config)
print(
    f"KL from the teacher: {losses[0]:.1f} before, {losses[-1]:.1f} at the tenth step"
)

# %% tags=["hide-output"]
with training.FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))


def measured(what: str, method: str, replies: str) -> list[float]:
    """A number for each seed."""
    key = (method, replies)
    return [float(r[what]) for r in runs if (r["method"], r["replies"]) == key]


def mean_of(values: list[float]) -> float:
    return sum(values) / len(values)


loss = {name: measured("valid_loss", name, "text") for name in ("hard", "soft")}
for name, values in loss.items():
    shown = ", ".join(f"{math.exp(value):.0f}" for value in values)
    print(f"{name} labels: held-out perplexity {shown}")
[of_teacher] = measured("valid_loss", "teacher", "")
print(f"teacher: {math.exp(of_teacher):.0f}")
soft_guess.settle(100 * (1 - math.exp(mean_of(loss["soft"]) - mean_of(loss["hard"]))))

# %% [markdown]
# Same text, same steps. A hard label says one thing about a token; the teacher says how likely 2,048 of them are. No seed with hard labels comes
# near one with soft ones. Both are far from the teacher, as 150 steps are few.
#
# Now the direction. The draft model itself, 60 more steps of 16 replies of 32 tokens, with each divergence, on replies that the teacher wrote or
# that the student writes as it learns. Two things are judged: does it *cover* the teacher's texts, and how much do its own texts *surprise*
# the teacher?

# %% tags=["hide-input"]
METHODS = {
    "forward KL": palette.blue,
    "JSD 0.5": palette.green,
    "reverse KL": palette.vermillion,
    "MiniLLM": palette.purple,
    "hard": palette.orange,
}
WRITERS = {"teacher": "o", "student": "s", "mixed": "^"}
fig, ax = plt.subplots(figsize=(4.8, 3.6))
print(f"{'':27}{'KL(p‖q)':>12}{'surprise':>17}{'entropy':>15}")
for (method, color), replies in itertools.product(METHODS.items(), WRITERS):
    columns = [measured(w, method, replies) for w in ("forward", "surprise", "entropy")]
    if columns[0]:
        ax.plot(columns[0], columns[1], WRITERS[replies], color=color, alpha=0.85)
        name = f"{method}, {replies} writes" if replies != "mixed" else method
        line = "".join(
            f"{mean_of(c):8.3f} ± {(max(c) - min(c)) / 2:.3f}" for c in columns
        )
        print(f"{name:27}{line}")
pulled = {
    (way, what): [v for w in WRITERS for v in measured(what, f"{way} KL", w)]
    for way in ("forward", "reverse")
    for what in ("forward", "surprise")
}
covers = max(pulled["forward", "forward"]) < min(pulled["reverse", "forward"])
picks = max(pulled["reverse", "surprise"]) < min(pulled["forward", "surprise"])
print(f"every forward run covers better: {covers}; every reverse run picks: {picks}")
start = [measured(w, "draft", "")[0] for w in ("forward", "surprise", "entropy")]
ax.plot(start[0], start[1], "*", color=palette.gray, markersize=11)
print(f"{'before':27}" + "".join(f"{value:8.3f}        " for value in start))
for method, color in METHODS.items():
    ax.plot([], [], "o", color=color, label=method)
for writer, marker in WRITERS.items():
    ax.plot([], [], marker, color=palette.gray, label=f"{writer} wrote")
ax.plot([], [], "*", color=palette.gray, label="before")
ax.legend(fontsize=7.5, ncols=2, loc="upper right")
low, high = ax.get_ylim()
ax.set_ylim(low, high + 0.45 * (high - low))
ax.set(
    xlabel="KL(p‖q) on the teacher's texts, nats: covers ←",
    ylabel="surprise of the teacher, nats",
)
figure(
    fig,
    alt=(
        "A dot for each seed. Forward KL: smallest divergence on the teacher's texts,"
        " but its own texts surprise the teacher more than before. Reverse KL and"
        " MiniLLM: larger divergence, least surprise. The JSD lies between them. Hard"
        " labels: large divergence and much surprise."
    ),
)

# %% [markdown]
# The drawing comes true on language. Every student that was pulled forward covers the teacher's texts better than every student that was pulled
# back, and writes texts that surprise the teacher more. $\beta = 0.5$ covers less than one and more than the other. MiniLLM surprises as little as the reverse KL, and covers a little less. The
# entropies say how: pulled back, a student writes fewer different things.
#
# Now what does *not* show. With the reverse KL it makes no difference beyond the spread who wrote the replies; with the forward KL the student's own
# replies even leave it a little more surprising. Replies of 32 tokens, by a draft that writes this kind of text already, hold few mistakes to learn
# from. The papers train longer replies, on tasks. And labels alone, from the teacher's own pen, make this student worse by both
# measures: one token drawn from a distribution says little about it.
#
# ## Play
#
# Does reverse KL always pick? Move the peaks, and turn $\beta$. For each position the figure shows the best of all bells.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
SIZES = {"distance": [2.5, 3.0, 4.0, 6.0], "beta": [0, 0.1, 0.3, 0.5, 0.7, 1]}
fits = {at: best(*at) for at in itertools.product(*SIZES.values())}
left = {at: float(bells[i].exp()[x < 0].sum()) for at, i in fits.items()}


def draw(distance: float, beta: float):
    fig, ax = plt.subplots(figsize=(4.8, 2.4))
    ax.plot(x, two_peaks(distance).exp(), color=palette.gray)
    student = bells[fits[distance, beta]].exp()
    ax.plot(x, student, color=palette.vermillion)
    ax.set(xlim=(-7, 7), ylim=(0, 0.085), yticks=[], xlabel="what is written")
    ax.set_title(f"{left[distance, beta]:.0%} of the student on the left")
    return fig


picked = {at for at, share in left.items() if share > 0.95}
smallest = min(beta for _, beta in picked)


def missing(distance: float, beta: float) -> str:
    if (distance, beta) not in picked:
        return f"{left[distance, beta]:.0%} is on the left: it covers."
    return "a smaller β can do it." if beta > smallest else ""


explore(
    draw,
    alt=lambda distance, beta: (
        f"Peaks {distance} apart, β = {beta}: the student has"
        f" {left[distance, beta]:.0%} of its probability on the left, and"
        f" {'lies on one peak' if (distance, beta) in picked else 'covers both peaks'}."
    ),
    title="One bell for two peaks",
    challenge="Make the student pick a peak, with the smallest β that can.",
    missing=missing,
    start={"distance": 3.0, "beta": 0.5},
    **SIZES,
)

# %% [markdown]
# It jumps. When peaks are near each other, even the reverse KL covers them, for the valley is no desert; when they are far, a small $\beta$ is enough. "Mode-seeking"
# is no property of a divergence alone: it takes a student that cannot fit.
#
# ## At scale
#
# What it takes to train the 8B student of the first cell under its teacher, and what it takes to store the teacher's logits instead. Gemma 3 keeps
# 256 of them per token ([Gemma Team 2025](https://arxiv.org/abs/2503.19786 "gemmateam2025gemma3")), drawn by their probabilities. And how much of
# the way from hard labels to the teacher do soft ones go? Hinton et al. report test errors on MNIST: 146 for the small net, 67 for
# the large one, 74 for the small one with its soft labels.

# %%
large, small = preset("llama-3.1-70b"), preset("llama-3.1-8b")
held = accounting.weight_bytes(large) / sum(accounting.adam_bytes(small).values())
asked = accounting.forward_flops(large, 1, 2048) / accounting.training_flops(
    small, 1, 2048
)
print(f"memory: the teacher adds {held:.0%} to weights, gradients and Adam's state")
print(f"time: to ask it costs {asked:.1f} times a step of the student")
for kept, bytes_each in ((large.vocab_size, 2), (256, 2 + 4), (1, 4)):
    print(f"{kept:7,} logits: {kept * bytes_each * 1e9 / 1e12:9.3f} TB for 1e9 tokens")

with torch.no_grad():
    p = teacher(course_model.tokens("valid")[None, :256])[0].softmax(-1)
shares = p.sort(descending=True).values.cumsum(-1)[:, [7, 63, 255]].mean(0)
print("our teacher's best 8, 64, 256 of 2,048 hold", *(f"{s:.0%}" for s in shares))

published = (146 - 74) / (146 - 67)
hard, soft_loss = mean_of(loss["hard"]), mean_of(loss["soft"])
ours = (hard - soft_loss) / (hard - of_teacher)
print(f"part of the gap that is closed: MNIST {published:.0%}, ours {ours:.0%}")

# %% [markdown]
# To ask the teacher costs more time than to train the student, and to hold it more memory than the student's whole training state. Stored logits
# pay the teacher once. But they fit only texts that were there before, so nothing can be learnt from the student's own. And
# whoever stores the *best* $k$ in place of drawn ones cuts off a tail, here a twentieth with 256, and teaches that it is 0. Of the gap
# we close less than Hinton et al., who had trained to the end: ours had 150 steps.
#
# With TRL on GPUs; set `temperature` to 1, for it does not reach the loss:
#
# ```python
# from trl.experimental.gkd import GKDConfig, GKDTrainer
#
# args = GKDConfig(
#     output_dir="student", lmbda=1.0, beta=1.0, temperature=1.0, max_new_tokens=256
# )
# trainer = GKDTrainer(
#     model="meta-llama/Llama-3.1-8B-Instruct",
#     teacher_model="meta-llama/Llama-3.1-70B-Instruct",
#     args=args,
#     train_dataset=dataset,  # "messages"
# )
# trainer.train()
# ```
#
# ## What to keep
#
# ```python
# log_p = teacher_logits.detach().log_softmax(-1)[:, :-1]   # logits at t: token t + 1
# log_q = student_logits.log_softmax(-1)[:, :-1]
# forward = (log_p.exp() * (log_p - log_q)).sum(-1)         # covers
# reverse = (log_q.exp() * (log_q - log_p)).sum(-1)         # picks
# loss = reverse[reply[:, 1:]].mean()                       # reply tokens only
# ```
#
# **Use** soft labels whenever teacher and student share a vocabulary: they are the cheapest gain. Forward when the student should keep
# the teacher's variety, reverse on its own texts when each single answer should be one that the teacher would give. **Not** when the vocabularies differ, and not when
# the teacher is no better than the labels that you have.
#
# <details><summary>Why does reverse KL pick a peak?</summary>
#
# The student's own probabilities are the weights: what it never writes costs nothing, what it writes where the teacher has nothing costs much.
#
# </details>
#
# <details><summary>Why the factor T²?</summary>
#
# The gradient of the softened KL shrinks like 1/T². The factor keeps it as strong as that of the hard labels, whatever T is.
#
# </details>
#
# <details><summary>The student wrote the text. Why is there no gradient through the sampling in GKD?</summary>
#
# The loss takes the text as data and compares what both would write at each place. How a token changes what follows is left out; that is what MiniLLM adds.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/06-compression/12-distillation.ipynb).
#
# Further reading: [Sanh et al. 2019](https://arxiv.org/abs/1910.01108 "sanh2019distilbert") distil BERT with a temperature, and
# [Minka 2005](https://www.microsoft.com/en-us/research/publication/divergence-measures-and-message-passing/ "minka2005divergence") shows which divergence covers and which picks.
