# %% [markdown]
# # Precision, power and cost
#
# What is a FLOP worth? It depends on how far its operands travelled, on whether anybody was there to be served, and on whether the job lived to save its result. Here you count joules, dollars, failures and carbon, check each sum against a bill that somebody published, and find how often a large run should save. At the end you can argue with a vendor.

# %% tags=["hide-input"]
from functools import partial

import numpy as np
import torch

from llmlab.checks.chips.precision_power_cost import check
from llmlab.chips import chips_and_roofline as cr
from llmlab.chips.precision_power_cost import carbon, energy, price, reliability
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
from llmlab.inference.engine import Engine, EngineConfig, SamplingParams
from llmlab.inference.prefill_decode_kv_cache import cost
from llmlab.models import real_model
from llmlab.models.accounting import kv_cache_bytes, parameters
from llmlab.models.chips import chip
from llmlab.models.presets import preset
from llmlab.parallelism.choosing import Job, machine, planner, shapes

# %% [markdown]
# ## What it costs
#
# Llama 3's largest model was trained on 16,384 H100. In 54 days the run was interrupted 466 times, 419 of them unplanned ([Llama Team 2024](https://arxiv.org/abs/2407.21783 "llama2024herd")). BLOOM, on 384 A100, saved a checkpoint every three hours ([Bekman 2022](https://huggingface.co/blog/bloom-megatron-deepspeed "bekman2022bloom")). If Llama 3 had done so:

# %%
llama3 = reliability.RUNS[0]
life = llama3.life[0]
mtbf = reliability.mtbf_of_parts(life_hours=life, parts=llama3.parts)
job = {"writing_hours": 1 / 60, "mtbf_hours": mtbf, "restart_hours": 10 / 60}
habit = 1 - 1 / reliability.expected_hours(work_hours=1, every_hours=3, **job)
rent = llama3.parts * price.GPU_HOURS[0].dollars
print(f"a failure every {mtbf:.1f} hours; one GPU lives for {life / 8766:.1f} years")
print(f"all of them, at ${price.GPU_HOURS[0].dollars} per hour: ${rent:,.0f} per hour")
print(f"saved every three hours: {habit:.0%} lost, ${habit * rent * 24:,.0f} per day")

# %% [markdown]
# (One minute for a checkpoint and ten for a restart are our assumptions. After a failure the work since the last checkpoint is repeated.)
#
# ## Predict

# %%
often_guess = predict(
    "A failure every 3.1 hours, a minute to save: how often is best?", unit="minutes"
)
twice_guess = predict(
    "You save half as often as is best. How much more do saving and repeating cost?",
    choices=("a quarter more", "half as much again", "twice as much"),
)

# %% [markdown]
# ## By hand
#
# A job fails every $M = 8$ hours on average, and a checkpoint takes $\delta = 1$ hour. Between two checkpoints it works for $\tau$ hours. There is one failure in $M$ hours, and on average it comes in the middle: half of $\tau$ is done again.
#
# | $\tau$ | saving: $\delta/\tau$ | repeating: $\tau/2 / M$ | lost |
# |---|---|---|---|
# | 2 | 1/2 | 1/8 | 5/8 |
# | 4 | 1/4 | 1/4 | 4/8 |
# | 8 | 1/8 | 1/2 | 5/8 |

# %%
for every in (2, 4, 8):
    lost = reliability.share_lost(every_hours=every, writing_hours=1, mtbf_hours=8)
    print(every, lost)
print("best:", reliability.young_hours(writing_hours=1, mtbf_hours=8), "hours")

# %% [markdown]
# ## The idea
#
# $n$ parts that live for $L$ hours each fail every $M = L/n$ hours together. Seldom saving repeats much work, frequent saving stops it:
#
# $$\text{lost} \approx \frac{\delta}{\tau} + \frac{\tau/2 + R}{M}, \qquad \tau_{\text{Young}} = \sqrt{2 \delta M}$$
#
# with $R$ for the restart ([Young 1974](https://doi.org/10.1145/361147.361115 "young1974first")). At the best $\tau$ both parts are equal. If $\tau$ is $f$ times too long or too short, their sum is $(f + 1/f)/2$ times as large. [Daly 2006](https://doi.org/10.1016/j.future.2004.11.016 "daly2006higher") also counts failures while one saves, restarts or repeats. If a failure is equally likely at any moment (the times between failures are exponential), this is exact: each $\tau$ of work takes $T = M e^{R/M} (e^{(\tau+\delta)/M} - 1)$.

# %% tags=["hide-input"]
MINUTES = np.geomspace(3, 240, 60)
saving = 1 / MINUTES
repeating = MINUTES / 60 / 2 / mtbf
restarting = np.full_like(MINUTES, job["restart_hours"] / mtbf)
fig, ax = plt.subplots(figsize=(4.8, 3.2))
names = ["restarting", "saving", "repeating"]
colors = [palette.gray, palette.orange, palette.sky]
parts = [100 * part for part in (restarting, saving, repeating)]
ax.stackplot(MINUTES, *parts, colors=colors, labels=names, alpha=0.8)
young = reliability.young_hours(writing_hours=1 / 60, mtbf_hours=mtbf)
ax.axvline(60 * young, color=palette.ink, ls="--", lw=1)
ax.text(60 * young * 1.06, 48, "Young", fontsize=9)
ax.set(xscale="log", xlabel="minutes between checkpoints", ylabel="% of the time lost")
ax.set(ylim=(0, 62), xlim=(3, 240), xticks=[5, 10, 20, 60, 180])
ax.set_xticklabels(["5", "10", "20", "60", "180"])
ax.minorticks_off()
ax.legend(loc="upper left", bbox_to_anchor=(0.14, 1.02), fontsize=9)
figure(
    fig,
    alt=(
        "Share of time lost over minutes between checkpoints for 16,384 GPUs."
        " Restarting is constant, saving falls, repeating rises; the sum is flat around"
        " Young's interval and steep on both sides."
    ),
)

# %% [markdown]
# ## Your turn
#
# Others report `failures` in so many `days` on `gpus` GPUs. Your job runs on `my_gpus`, and stops when any of them fails. A checkpoint stops it for `writing_seconds`, a failure for `restart_minutes`. Return the mean hours between its failures, Young's interval in *minutes*, and the share lost.


# %%
def my_checkpoint_plan(failures, days, gpus, my_gpus, writing_seconds, restart_minutes):
    """(hours between failures, minutes between checkpoints, share lost)"""
    raise NotImplementedError("five lines of yours")


your_turn(check.checkpoint_plan, my_checkpoint_plan)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(failures, days, gpus, my_gpus, writing_seconds, restart_minutes):
    between = days * 24 / failures * gpus / my_gpus
    writing, restart = writing_seconds / 3600, restart_minutes / 60
    every = (2 * writing * between) ** 0.5
    lost = writing / every + (every / 2 + restart) / between
    return between, every * 60, lost


your_turn(check.checkpoint_plan, one_answer)
show(reliability.daly_hours, reliability.best_hours, reliability.simulate)

# %% [markdown]
# ## The code
#
# | module | goes in | comes out |
# |---|---|---|
# | `reliability` | hours: of work, between checkpoints, between failures | a share that is lost, or hours |
# | `energy` | MACs, bytes from each memory, seconds | joules, by part |
# | `price` | dollars per hour, tokens per second, a share that is busy | dollars per million tokens |
# | `carbon` | GPU-hours, watts, PUE, grams per kWh | kWh and kg |
#
# Arguments have their unit in their name and are given by name, so that seconds do not pass for hours. What cannot be is refused: a negative energy, a PUE below 1, a card that is busy for more than all of the day.
#
# ## Against what was published
#
# Daly prints three intervals, and four runs tell how often they failed. Brought to the life of one GPU:

# %%
printed = [117, 57, 9.1]  # minutes, for M of 24 h, 6 h and 15 min, δ of 5 min
found = [
    60 * reliability.daly_hours(writing_hours=5 / 60, mtbf_hours=m)
    for m in (24, 6, 0.25)
]
compare(torch.tensor(found), torch.tensor(printed), "Daly's intervals", tol=0.5)
for run in reliability.RUNS:
    low, high = run.life
    of_1024 = reliability.mtbf_of_parts(life_hours=(low + high) / 2, parts=1024)
    years = f"{low / 8766:.1f}" + (f" to {high / 8766:.1f}" if high > low else "")
    print(
        f"{run.name:8} {run.chip}: {years:10} years; 1,024 GPUs: {of_1024:3.0f} hours"
    )
rsc = [
    reliability.mtbf_of_parts(life_hours=reliability.RUNS[1].life[0], parts=n)
    for n in (16_384, 131_072)
]
print(f"RSC-1 at 16,384 and 131,072 GPUs: {rsc[0]:.1f} and {rsc[1]:.2f} hours")

# %% [markdown]
# The last line is what Meta prints for its cluster RSC-1: 1.8 and 0.23 hours, from 6.50 failures per 1,000 node-days. But it also *measured* 7.9 hours at 1,024 GPUs ([Kokolis et al. 2025](https://arxiv.org/abs/2410.21680 "kokolis2025revisiting")), a quarter of what the same rate says. So hardware is not what stops jobs of that size. OPT counted every restart, 35 by hand and 70 others ([Zhang et al. 2022](https://arxiv.org/abs/2205.01068 "zhang2022opt")); the others count what they call failures. Ask what was counted. And count yourself: Llama 3's table has 148 faulty GPUs among its 419, which is 35%, and prints 30.1% beside them ([Lockwood](https://glennklockwood.com/garden/component-reliability "lockwood2025components")).
#
# ## The experiment
#
# Now Llama 3's run again and again, hundreds of times for each interval: 54 days of work, with failures drawn at random at its rate. In one set they are independent (exponential). In the other they come in bursts (Weibull, shape 0.6, same mean): after a failure the next one is likelier for a while. Nothing is fitted.

# %% tags=["hide-input"]
WORK = 54 * 24.0


def tried(factor, shape=1.0, runs=400, seed=0, **other):
    """(minutes, mean share lost, its standard error)"""
    every = reliability.nearest_interval(WORK, young * factor)
    took = reliability.simulate(
        work_hours=WORK,
        every_hours=every,
        shape=shape,
        runs=runs,
        seed=seed,
        **(job | other),
    )
    extra = took / WORK - 1  # per hour of work, as the formula has it
    return 60 * every, extra.mean(), extra.std(ddof=1) / runs**0.5


def exact(minutes):
    took = reliability.expected_hours(work_hours=1, every_hours=minutes / 60, **job)
    return took - 1


FACTORS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6)
alone = [tried(f) for f in FACTORS]
bursts = [tried(f, shape=0.6) for f in FACTORS]
fig, ax = plt.subplots(figsize=(4.8, 3.4))
ax.plot(MINUTES, [100 * exact(m) for m in MINUTES], color=palette.blue, label="exact")
first = [100 * reliability.share_lost(every_hours=m / 60, **job) for m in MINUTES]
ax.plot(MINUTES, first, "--", color=palette.gray, label="first order")
for points, marker, name in ((alone, "o", "drawn"), (bursts, "s", "drawn, in bursts")):
    at, lost, error = np.array(points).T
    color = palette.ink if marker == "o" else palette.orange
    ax.errorbar(at, 100 * lost, 300 * error, fmt=marker, ms=5, color=color, label=name)
ax.axvline(60 * young, color=palette.ink, ls=":", lw=1)
ax.set(xscale="log", xlabel="minutes between checkpoints", ylabel="% more time")
ax.set(ylim=(10, 45), xlim=(4, 150), xticks=[5, 10, 20, 40, 80])
ax.set_xticklabels(["5", "10", "20", "40", "80"])
ax.minorticks_off()
ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(0.44, 1.0))
figure(
    fig,
    alt=(
        "Time lost over minutes between checkpoints. Simulated runs lie on the exact"
        " curve, whose lowest point is near Young's interval of 19 minutes; the"
        " first-order curve lies a little below. With bursts less is lost, and the"
        " lowest point lies further right."
    ),
)
worst = max(abs(lost - exact(at)) / error for at, lost, error in alone)
print(f"drawn against exact: at most {worst:.1f} standard errors apart")


def bottom(at, lost):
    """Minutes where a / τ + b τ + c, laid through these points, is smallest."""
    at = np.array(at)
    terms = np.stack([1 / at, at, np.ones_like(at)], axis=1)
    a, b, _ = np.linalg.lstsq(terms, np.array(lost), rcond=None)[0]
    return (a / b) ** 0.5


NEAR = (0.5, 0.6, 0.75, 0.9, 1.1, 1.35, 1.6, 2.0)
for shape in (1.0, 0.6):
    bottoms = []
    for seed in range(8):
        at, lost, _ = zip(*(tried(f, shape, 100, seed) for f in NEAR), strict=True)
        bottoms.append(bottom(at, lost))
    print(f"shape {shape}: lowest at {np.mean(bottoms):.1f}", end=" ")
    print(f"± {np.std(bottoms):.2f} minutes, eight seeds")
print(f"the exact curve, laid the same way: {bottom(at, [exact(m) for m in at]):.1f}")
best = 60 * reliability.best_hours(writing_hours=1 / 60, mtbf_hours=mtbf)
daly = 60 * reliability.daly_hours(writing_hours=1 / 60, mtbf_hours=mtbf)
print(f"Young {60 * young:.1f}, Daly {daly:.1f}, exact {best:.1f} minutes")
floor = job["restart_hours"] / mtbf
for factor in (0.5, 2, 4):
    more = (exact(60 * young * factor) - floor) / (exact(60 * young) - floor)
    print(f"{factor:>3} × Young: {more:.2f} times as much for saving and repeating")
beside = {"writing_hours": 2 / 3600, "behind_hours": 1 / 60}
short = reliability.young_hours(writing_hours=2 / 3600, mtbf_hours=mtbf) / young
for name, point in (("stops for 60 s", tried(1)), ("beside", tried(short, **beside))):
    print(f"{name:15} every {point[0]:4.1f} min: {point[1]:.1%} more time")
spares = reliability.spares_needed(mean_down=2 * 3, risk=0.01)
print(f"two a day, three days to repair (our guess), 99% of the time: {spares} spares")

# %% tags=["hide-output"]
often_guess.settle(round(60 * young), digits=2)
twice_guess.settle("a quarter more")

# %% [markdown]
# The random runs lie on Daly's exact curve, and their lowest point is his interval. Young's, of 1974, is a few percent longer and loses nothing by it: the bottom is flat. Twice too seldom costs a quarter more. So nobody needs to know the failure rate well. What pays is a smaller $\delta$ and $R$. Failures in bursts cost *less* than independent ones: a second failure soon after the first finds little to destroy, and the long quiet times between bursts let one save less often. The formula errs on the safe side.
#
# What the formula leaves out: a checkpoint that is written beside the work (here it stops the work for 2 s, but can be used only a minute later), spare machines, and what hits all of them at once. OPT's whole cluster was deleted by mistake ([Zhang et al. 2022](https://github.com/facebookresearch/metaseq/blob/main/projects/OPT/chronicles/final_update.md "metaseq2022chronicles")). The same notes ask for 12 spare nodes, because two go down each day. The last lines above try two of these.
#
# ## Joules
#
# The time of a transfer can hide behind arithmetic, its energy cannot: each operation and each byte is paid for. Llama 3.1 8B writes a token on an A100 of 40 GB, for one user and for each of 64, each with 2,048 tokens of context. Prices: arithmetic as designed at 7 nm ([Jouppi et al. 2021](https://doi.org/10.1109/ISCA52012.2021.00010 "jouppi2021ten"), after [Horowitz 2014](https://doi.org/10.1109/ISSCC.2014.6757323 "horowitz2014computing")), memory and the 54 W that are always drawn (*static*) as measured on the card ([Antepara et al. 2025](https://escholarship.org/uc/item/6189368s "antepara2025benchmark")).

# %% tags=["hide-input"]
llama, costs = preset("llama-3.1-8b"), energy.costs_a100()
a100 = chip("A100 40GB")  # the card that was measured


def token_joules(users, weight_bytes, per_second=None):
    """Joules of one token, by part; the card waits for memory, or for who asks."""
    work = cr.step(llama, users, 1, 2048, weight_bytes)
    took = cr.seconds(work, a100.speed("bf16"), a100.bandwidth)
    if per_second:
        took = 1 / per_second
    parts = energy.joules(costs, "bf16", work.flops / 2, {"HBM": work.bytes}, took)
    return {name: joule / users for name, joule in parts.items()}


rows = {
    "1 user, bf16": token_joules(1, 2),
    "1 user, weights int8": token_joules(1, 1),
    "1 user, int8, 10 per second": token_joules(1, 1, per_second=10),
    "64 users, bf16": token_joules(64, 2),
    "64 users, weights int8": token_joules(64, 1),
}
print(f"{'joules per token':27} arithmetic     HBM   static      sum")
for name, parts in rows.items():
    print(f"{name:27}", *(f"{joule:8.4f}" for joule in parts.values()), end="")
    print(f"{sum(parts.values()):9.3f}")
alone_pj = sum(rows["1 user, bf16"].values()) / cr.step(llama, 1, 1, 2048).flops * 1e12
chips_only = energy.printed("read", "HBM2", "28 nm").pj
old = energy.costs_45nm()
products = 4 * old.byte_pj["DRAM"] / energy.printed("multiply", "fp32", "45 nm").pj
print(
    f"\nat 45 nm, four bytes from DRAM took as much as {products:.0f} products of fp32"
)
print(f"pJ per byte of HBM: {chips_only:.0f} in its chips,", end=" ")
print(f"{costs.byte_pj['HBM']:.0f} all the way to a unit")
print(f"pJ per FLOP: units {costs.mac_pj['bf16'] / 2:.2f};", end=" ")
print(f"one user's token {alone_pj:.0f}; a chip at full speed and power:")
for name in ("A100", "H100", "B200", "TPU v4", "MI300X"):
    one = chip(name)
    floor = energy.floor_pj_per_flop(one.power, one.speed("bf16", "fp16"))
    print(f"  {name} {floor:.2f}", end="")

# %% [markdown]
# For one user, arithmetic is a fraction of a percent of the bill, so its format does not matter. Half the bytes save half. Company saves far more: 64 users share each weight, and their caches cost as much as those shared weights. But if a user asks for ten tokens per second and the card waits in between, most of the bill is static power, which no format makes smaller. A vendor who divides watts by peak sells the last line, and one user's token takes more than a hundred times that. A figure for memory may be for its chips alone, too ([O'Connor et al. 2017](https://doi.org/10.1145/3123939.3124545 "oconnor2017finegrained")): the rest of the way costs four times as much again.
#
# ## Dollars
#
# The course's own engine on this machine, SmolLM2 writing 8 tokens after a prompt of 32 for one user and for eight, beside an H100 that does what the bound of [prefill and decode](../07-inference/01-prefill-decode-kv-cache.ipynb) allows. The laptop is assumed: 1,000 dollars, four years, 30 W, 15 cents per kWh.

# %% tags=["hide-input", "nbval-ignore-output"]
model = real_model.load()
laptop = price.owned_dollars_per_hour(
    dollars=1000, years=4, watts=30, pue=1, dollars_per_kwh=0.15
)
h100 = cost.MACHINES["H100 80GB"]
prompt = list(range(100, 132))
print(f"{'users':>5} {'tokens/s':>9} {'here':>11} {'H100, busy all day':>19}")
for users in (1, 8):
    engine = Engine(model, EngineConfig(num_blocks=64, prefix_caching=False))
    asked = [prompt] * users, SamplingParams(max_new_tokens=8)
    took, used, why = energy.measured(partial(engine.generate, *asked))
    speed = 8 * users / took
    bound = cost.passes(model.config, h100, batch=users, past=36)
    dollars = [
        price.dollars_per_million_tokens(dollars_per_hour=d, tokens_per_second=s)
        for d, s in ((laptop, speed), (price.GPU_HOURS[0].dollars, bound.rate))
    ]
    print(f"{users:5} {speed:9.0f} {dollars[0]:7.3f} $/M {dollars[1]:15.4f} $/M")
same = dollars[1] / dollars[0]
print(f"the H100 is the cheaper one if it is busy for more than {same:.0%} of the day")
print("joules per token here:", why if used is None else f"{used / 8 / users:.2f}")

# %% [markdown]
# A rented card beats a laptop, if somebody uses it; but what a model this small reaches of a bound is another question. Now Llama 8B on that H100 as a service, with as many users as its memory holds: one assumption after the other moves from its low end to its high one, and the others stay at a base value (the line in the figure). And the same card bought, if it costs 30,000 dollars, lasts four years and pays 8 cents per kWh (all assumed).

# %% tags=["hide-input"]
BASE = {
    "dollars_per_hour": 3.99,
    "busy": 0.5,
    "reached": 0.5,
    "context": 2048,
    "weight_bytes": 2,
}
RANGES = {
    "dollars_per_hour": (2.69, 12.29),
    "busy": (0.1, 0.9),
    "reached": (0.3, 0.8),
    "context": (512, 8192),
    "weight_bytes": (1, 2),
}
SAID = {
    "dollars_per_hour": "$ per hour",
    "busy": "busy",
    "reached": "of the bound",
    "context": "tokens behind",
    "weight_bytes": "bytes per weight",
}


def served(dollars_per_hour, busy, reached, context, weight_bytes):
    """Dollars per million tokens written, memory full of users."""
    weights = parameters(llama) * weight_bytes
    cache = kv_cache_bytes(llama, 1, 1)
    users = cost.max_batch(0.9 * h100.memory, weights, cache, int(context))
    work = cr.step(llama, users, 1, int(context), weight_bytes)
    took = cr.seconds(work, h100.speed, h100.bandwidth) / reached
    return price.dollars_per_million_tokens(
        dollars_per_hour=dollars_per_hour,
        tokens_per_second=users / took,
        utilisation=busy,
    )


bars = price.tornado(served, BASE, RANGES)
middle = served(**BASE)
fig, ax = plt.subplots(figsize=(4.8, 2.9))
for y, bar in enumerate(reversed(bars)):
    for end, at, color in (
        (bar.cost_at_low, bar.low, palette.sky),
        (bar.cost_at_high, bar.high, palette.orange),
    ):
        ax.barh(y, end - middle, left=middle, color=color, height=0.6)
        side = "left" if end >= middle else "right"
        ax.text(end, y, f" {at:g} ", ha=side, va="center", fontsize=9)
ax.axvline(middle, color=palette.ink, lw=1)
ax.set(yticks=range(len(bars)), yticklabels=[SAID[b.name] for b in reversed(bars)])
ax.set(xlabel="dollars per million tokens written", xscale="log", xlim=(0.07, 3))
ax.set(xticks=[0.1, 0.2, 0.5, 1, 2])
ax.set_xticklabels(["0.1", "0.2", "0.5", "1", "2"])
ax.minorticks_off()
ax.grid(False)
figure(
    fig,
    alt=(
        "Tornado chart of dollars per million tokens: how busy the card is and how"
        " long the texts are move the price most, then the price per hour and the share"
        " of the bound that is reached, bytes per weight least."
    ),
)
power = {"watts": 700, "pue": 1.54, "dollars_per_kwh": 0.08}
owned = price.owned_dollars_per_hour(dollars=30_000, years=4, **power)
electric = price.owned_dollars_per_hour(dollars=0, years=4, **power)
print(f"the card bought: ${owned:.2f} per hour,", end=" ")
print(f"{electric / owned:.0%} of it electricity\n")
day = price.DEEPSEEK_DAY
reading, writing = day.nodes_from_tokens
revenue = day.revenue_dollars(found=0.14, read=0.55, written=2.19)
print(f"DeepSeek's day: {day.nodes} nodes, ${day.cost_dollars:,.0f};", end=" ")
print(f"its tokens take {reading:.1f} + {writing:.1f} = {reading + writing:.1f} nodes")
print(
    f"sold at R1's prices: ${revenue:,.0f}, {revenue / day.cost_dollars - 1:.0%} more"
)
node = {"dollars_per_hour": day.node_dollars_per_hour}
for name, rate in (("in", day.read_per_second), ("out", day.written_per_second)):
    dollars = price.dollars_per_million_tokens(tokens_per_second=rate, **node)
    print(f"  ${dollars:.2f} per million tokens {name}", end=";")
runs = {
    "DeepSeek-V3": (37e9, 14.8e12, chip("H100").speed("fp8"), 2.664e6),
    "Llama 3.1 405B": (405e9, 15.6e12, chip("H100").speed("bf16"), 30.84e6),
}
for name, (n, d, peak, hours) in runs.items():
    used = price.implied_mfu(
        parameters=n, tokens=d, flops_per_second=peak, gpu_hours=hours
    )
    print(
        f"\n{name:15} 6ND are {used:.1%} of the peak of {hours / 1e6:.2f} M hours",
        end="",
    )
print(f"\n{'DeepSeek-V3':15} 2.788 M hours at $2: ${2.788 * 2:.3f} M in all")
large = shapes.llama(preset("llama-3.1-405b"))
llama_job = Job(large, batch=2048, seq=8192, machine=machine("h100-80gb"))
fastest = planner.search(llama_job, llama3.parts).ranked[0]
days = planner.days(llama_job, fastest.step, 15.6e12)
dollars = planner.dollars(llama3.parts, days, price.GPU_HOURS[0].dollars)
print(
    f"{'Llama 3.1 405B':15} the planner says {days * 24 * llama3.parts / 1e6:.1f} M",
    end=" ",
)
print(f"hours, or ${dollars / 1e6:.0f} M at $2.69")

# %% [markdown]
# How busy a card is and how long the texts are decide more than its rent does, and both are up to the customer. A brochure's dollars per token assume them silently. Bits move little here, because most of the memory holds caches. And who owns the card pays for the card: a vendor's watts matter to the grid, and hardly to this sum.
#
# DeepSeek printed 226.75 nodes, 87,072 dollars of rent, 562,027 of sales and 545% ([DeepSeek 2025](https://github.com/deepseek-ai/open-infra-index/blob/main/202502OpenSourceWeek/day_6_one_more_thing_deepseekV3R1_inference_system_overview.md "deepseek2025inference")): all of it follows from a handful of numbers, but for the rounding of its tokens. It also says what the 545% leave out: most tokens are not sold at that price, or not at all. The 5.576 million dollars of DeepSeek-V3 ([2024](https://arxiv.org/abs/2412.19437 "deepseek2024v3")) are one run at an assumed rent, without the runs before it. A run takes about $6ND$ FLOPs ($N$ parameters, $D$ tokens): of what the hours paid for could do at peak, DeepSeek-V3 used a sixth and Llama a third (the MFU over all hours). The planner of [choosing a split](../05-parallelism/11-choosing.ipynb) was fitted on A100 and asks for a fifth more hours than Llama took; that is how well one knows such a bill beforehand. (Rents: [Data Receipts 2026](https://github.com/datareceipts/data-receipts/tree/main/109-gpu-pricing "datareceipts2026gpu"), read on 9 November: one chip, a factor of 4.6.)
#
# ## Carbon
#
# Electricity is GPU-hours × watts × PUE (what the building takes over what its computers take: 1.54 on average, [Uptime 2025](https://thefreesheet.com/2026/01/19/data-centre-efficiency-flatlines-for-sixth-year-as-ai-power-demands-soar "uptime2025survey")). The grid turns it into kilograms, and making the machines comes on top.

# %% tags=["hide-input"]
for run in carbon.TRAININGS:
    ours = "-" if run.tonnes is None else f"{run.tonnes:,.1f} t"
    print(f"{run.name:10} {run.kwh / 1000:7,.0f} MWh {ours:>9}", end="  ")
    print(f"printed {run.printed_mwh or '-'} MWh, {run.printed_tonnes:,} t")
bloom, llama31 = carbon.TRAININGS[1:]
idle = carbon.running_kg(kwh=carbon.BLOOM_IDLE_KWH, grams_per_kwh=57) / 1000
print(f"BLOOM: {bloom.tonnes:.1f} t + {idle:.1f} t waiting + 11.2 t made", end=" = ")
print(f"{bloom.tonnes + idle + carbon.BLOOM_MADE_TONNES:.1f} t; printed 50.5")
both = carbon.implied_grams_per_kwh(kg=llama31.printed_tonnes * 1000, kwh=llama31.kwh)
print(f"Llama 3.1: PUE × grid must have been {both:.0f} g per kWh of its GPUs")
made = carbon.made_kg(
    machine_kg=carbon.HGX_H100_KG / 8, used_hours=1, life_hours=4 * 8766, busy=0.6
)
for name, grams in (("there", both), ("on BLOOM's grid", 57)):
    share = made / (made + 0.7 * grams / 1000)
    print(f"an H100-hour {name}: {share:.0%} of it from making the card")

# %% [markdown]
# GPT-3: [Patterson et al. 2021](https://arxiv.org/abs/2104.10350 "patterson2021carbon"); BLOOM: [Luccioni et al. 2023](https://arxiv.org/abs/2211.02001 "luccioni2023bloom"); Llama 3.1: [its card](https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/MODEL_CARD.md "meta2024llama31"), which also prints 0 t "market-based": certificates were bought. The making of eight H100: [NVIDIA 2025](https://images.nvidia.com/aem-dam/Solutions/documents/HGX-H100-PCF-Summary.pdf "nvidia2025pcf"). BLOOM's headline of 25 t is half of what its authors count in all.
#
# ## Play
#
# Llama 3's failure rate at other sizes, always at the best interval. A restart takes one minute here: spare machines stand by.

# %% tags=["hide-input", "slider"]
SIZES = [1024, 4096, 16_384, 65_536, 131_072]
STOPS = [1, 10, 60, 300]
GUIDES = {1: palette.green, 10: palette.orange, 60: palette.purple}


def plan(gpus, stop):
    """(mean hours between failures, best interval in hours, share of time lost)"""
    between = reliability.mtbf_of_parts(life_hours=life, parts=gpus)
    every = reliability.best_hours(writing_hours=stop / 3600, mtbf_hours=between)
    took = reliability.expected_hours(
        work_hours=1,
        every_hours=every,
        writing_hours=stop / 3600,
        mtbf_hours=between,
        restart_hours=1 / 60,
    )
    return between, every, 1 - 1 / took


def draw(gpus: int, stop: int):
    fig, ax = plt.subplots(figsize=(4.8, 3.2))
    for each, color in GUIDES.items():
        lost = [100 * plan(n, each)[2] for n in SIZES]
        ax.plot(SIZES, lost, "--", color=color, lw=1, label=f"{each} s")
    ax.plot(SIZES, [100 * plan(n, stop)[2] for n in SIZES], color=palette.blue, lw=2)
    ax.plot(gpus, 100 * plan(gpus, stop)[2], "o", ms=9, color=palette.blue)
    ax.axhline(20, color=palette.gray, lw=1)
    ax.set(xscale="log", xlabel="GPUs", ylabel="% of the time lost", ylim=(0, 65))
    ax.set(xticks=SIZES)
    ax.set_xticklabels(["1 k", "4 k", "16 k", "65 k", "131 k"])
    ax.minorticks_off()
    ax.legend(fontsize=9, title="checkpoint", title_fontsize=9, loc="upper left")
    return fig


def told(gpus: int, stop: int) -> str:
    between, every, lost = plan(gpus, stop)
    return (
        f"{gpus:,} GPUs fail every {60 * between:.0f} minutes; {stop} s to save:"
        f" best every {60 * every:.1f} minutes, {lost:.1%} lost"
    )


def missing(gpus: int, stop: int) -> str:
    if gpus != SIZES[-1]:
        return "the question is about 131,072 GPUs"
    if plan(gpus, stop)[2] >= 0.2:
        return f"{plan(gpus, stop)[2]:.1%} are lost"
    longer = [s for s in STOPS if s > stop and plan(gpus, s)[2] < 0.2]
    return f"{longer[-1]} s would do" if longer else ""


explore(
    draw,
    alt=told,
    title="How large can a job be?",
    challenge="131,072 GPUs, less than 20% lost: the longest checkpoint that does it.",
    missing=missing,
    start={"gpus": 16_384, "stop": 60},
    gpus=SIZES,
    stop=STOPS,
)

# %% [markdown]
# ## At scale
#
# ```bash
# nvidia-smi --query-gpu=power.draw.average,power.draw.instant --format=csv -l 1
# dcgmi dmon -e 155,156,1002,1005    # watts, millijoules, SMs active, DRAM active
# perf stat -a -e power/energy-pkg/,power/energy-ram/ -- python generate.py
# codecarbon monitor --no-api -- python train.py    # or ZeusMonitor, in the code
# ```
#
# ```python
# import torch.distributed.checkpoint as dcp
# saving = dcp.async_save(state, checkpoint_id=f"step-{step}")    # δ: the copy only
# saving.result()    # before the next one: only now can it be used
# ```
#
# MegaScale ran on more than 10,000 GPUs for several weeks with over 100 restarts ([Jiang et al. 2024](https://arxiv.org/abs/2402.15627 "jiang2024megascale")). How many weeks it does not say, so no rate follows.
#
# ## What to keep
#
# ```python
# mtbf = life_of_one_gpu / gpus
# every = (2 * writing * mtbf) ** 0.5
# lost = writing / every + (every / 2 + restart) / mtbf
# dollars_per_million = dollars_per_hour / (tokens_per_second * busy * 3600) * 1e6
# tonnes = gpu_hours * watts / 1e3 * pue * grams_per_kwh / 1e6
# ```
#
# **Use them** before you sign. **Not** to a second digit: rents, rates and grids change by more. The part in one table:
#
# | lesson | the brochure says | it leaves out | ask for |
# |---|---|---|---|
# | [01](01-chips-and-roofline.ipynb) | FLOP/s | zeros that were counted, the memory | dense, in my format, with the bandwidth |
# | [02](02-nvidia-gpu.ipynb) | cores, occupancy | loads that do not coalesce, banks that collide | my kernel's bytes per second |
# | [03](03-tpu.ipynb) | the size of the array | filling, draining, shapes that do not fit | utilisation at my shapes |
# | [04](04-ascend-and-other-accelerators.ipynb) | "runs your model" | missing operators, other defaults | my block's logits and gradients |
# | [05](05-clusters-and-networks.ipynb) | the speed of a port | collisions, and links that are down | an all-reduce of my size, two links down |
# | 06 | per watt, per million tokens | idle hours, static power, restarts | joules and dollars at my batch, failures per 1,000 node-days |
#
# <details><summary>Why is the restart not in Young's interval?</summary>
#
# It comes once per failure, however often one saves. It adds to what is lost, and shifts nothing.
#
# </details>
#
# <details><summary>A chip does twice the FLOP/s per watt. What happens to the bill of a token at batch 1?</summary>
#
# Next to nothing: it was paid for bytes.
#
# </details>
#
# <details><summary>Two services have the same cards and rents. One is three times as dear. Is it greedy?</summary>
#
# Perhaps its cards wait for customers two thirds of the day, or its texts are longer.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/09-chips/06-precision-power-cost.ipynb).
#
# Further reading: [Patterson et al. 2021](https://arxiv.org/abs/2104.10350 "patterson2021carbon") on what to report; [Kokolis et al. 2025](https://arxiv.org/abs/2410.21680 "kokolis2025revisiting") on 150 million GPU-hours.
