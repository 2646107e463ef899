# %% [markdown]
# # Continuous batching
#
# A step of a language model reads all weights, whether it computes one token or sixteen. So a server computes many requests at once; but they come at any time and end at any time, and a batch that begins and ends together is mostly padding. Continuous batching plans anew
# before *every step*. This lesson builds that plan, vLLM's own rule, measures what it gains and what it costs, and ends with two machines that share the work. At the end you own the scheduler.

# %% tags=["hide-input"]
import csv
import statistics

import numpy as np

from llmlab.checks.inference.continuous_batching import check
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
from llmlab.inference import continuous_batching as batching
from llmlab.inference.continuous_batching import (
    Cost,
    Job,
    Limits,
    Link,
    in_batches,
    percentile,
    published,
    schedule,
    serve_trace,
    simulate,
)
from llmlab.inference.paged_attention import BlockManager, PagedCache
from llmlab.models import real_model
from llmlab.models.presets import preset
from llmlab.parallelism import launch

with batching.FILE.open(newline="", encoding="utf-8") as file:
    runs = list(csv.DictReader(file))

# %% [markdown]
# ## What it costs
#
# SmolLM2-135M on one core, stored by `scripts/continuous_batching_sweep.py`: steps of different sizes, and a straight line through them. A step takes $a + b \cdot \text{tokens} + c \cdot \text{cached}$ seconds, where *cached* are the tokens that attention looks back at.

# %%
best = {}
for run in runs:
    if run["task"] == "step":
        size = int(run["tokens"]), int(run["cached"])
        best[size] = min(best.get(size, 99.0), float(run["seconds"]))
sizes = np.array([(1, *size) for size in best])
seconds = np.array([*best.values()])
weight = 1 / seconds[:, None]  # relative errors
a, b, c = np.linalg.lstsq(sizes * weight, seconds * weight[:, 0])[0]
cost = Cost(a, b, c)
off = np.abs(sizes @ [a, b, c] / seconds - 1).max()
print(f"a {1e3 * a:.0f} ms, b {1e3 * b:.1f} ms, c {1e6 * c:.0f} µs")
print(f"of {len(best)} sizes none is further off than {off:.0%}")
one, sixteen = cost.seconds(1, 64), cost.seconds(16, 16 * 64)
print(f"alone: {1 / one:.0f} tokens per second; 16 at once: {16 / sixteen:.0f}")
print(f"a step of 16 takes {sixteen / one:.1f} times as long as a step of 1")

# %% [markdown]
# Fifteen more seats cost about as much as the first one alone. When they stay empty, most of the machine is lost; when they are filled with padding, it is lost and paid for.
#
# ## Predict
#
# Twelve requests, three of which get long answers (36 to 48 tokens) and nine short ones (4 to 8), four at a time. A **static** batch begins together and ends with its longest; a **continuous** one takes in the next request as soon as one ends.

# %%
faster_guess = predict("How many times as fast is continuous as static?", unit="times")
static_guess = predict(
    "And the static batch of four, compared with one request at a time?",
    choices=("faster", "about the same", "slower"),
)

# %% [markdown]
# ## By hand
#
# Two slots, three requests: A writes 4 tokens, B one, C two. Prompts take no time. A letter is a computed token, a dot an empty row that is computed in vain.
#
# | step | 1 | 2 | 3 | 4 | 5 | 6 |
# |---|---|---|---|---|---|---|
# | static | A B | A · | A · | A · | C | C |
# | continuous | A B | A C | A C | A | | |
#
# Seven tokens: six steps, or four. Here is the same from the simulator of this lesson, at a second a step:

# %%
three = batching.trace([0.0, 0.0, 0.0], prompts=[1, 1, 1], outputs=[4, 1, 2])
second = Cost(a=1.0, b=0.0)
print("static    ", in_batches(three, second, size=2).end, "s")
print("continuous", simulate(three, second, Limits(max_sequences=2)).end, "s")

# %% [markdown]
# ## The idea
#
# Now on the real model: eight requests, four slots, tokens written greedily. Each row of the picture is a slot, each column a decoding step; the numbers are requests, and a hatched cell is a row computed in vain. The first token of each request comes from the pass that reads its prompt, so a text of nine tokens takes eight columns.

# %% tags=["hide-input"]
real = real_model.load()
words = real_model.load_tokenizer().encode("The history of the city began when a river")
prompts = [words.ids[: 2 + i % 7] for i in range(8)]
outputs = [9, 2, 3, 2, 6, 3, 2, 3]
served = {}
for way in ("alone", "static", "continuous"):
    memory = PagedCache(real.config, BlockManager(40, 16))
    served[way] = serve_trace(real, memory, prompts, outputs, way, slots=4)


def flat(lists: list[list[int]]) -> list[int]:
    """All tokens, one request after the other."""
    return [token for tokens in lists for token in tokens]


TINTS = ["#cfe3f2", "#fbe3b5", "#cfe8dc", "#f3d5e3"]
fig, axes = plt.subplots(2, 1, figsize=(4.8, 3.6), sharex=True)
for ax, way in zip(axes, ("static", "continuous"), strict=True):
    seats: list[int | None] = [None] * 4  # who sits in which slot
    for step, row in enumerate(served[way].rows):
        here = [request for request in row if request >= 0]
        seats = [s if s in here else None for s in seats]
        for request in here:
            if request not in seats:
                seats[seats.index(None)] = request
        empty = row.count(-1)
        for slot, request in enumerate(seats):
            look = {"facecolor": palette.card, "edgecolor": palette.card}
            if request is not None:
                look = {
                    "facecolor": TINTS[request % 4],
                    "edgecolor": palette.ink,
                }
            elif empty:
                look["edgecolor"] = palette.vermillion
                look["hatch"] = "////"
                empty -= 1
            box = plt.Rectangle((step + 0.05, slot - 0.45), 0.9, 0.9, **look)
            ax.add_patch(box)
            if request is not None:
                at = (step + 0.5, slot)
                ax.text(*at, str(request), ha="center", va="center", fontsize=8)
    ax.set(ylim=(3.6, -0.6), yticks=range(4), xlim=(0, 13.5), ylabel="slot")
    ax.set_title(f"{way}: {len(served[way].rows)} steps", loc="left")
    ax.grid(visible=False)
axes[1].set_xlabel("step")
axes[1].set_xticks(range(0, 14, 2))
figure(
    fig,
    alt=(
        f"Two charts of four slots over time. Static takes"
        f" {len(served['static'].rows)} steps, and most cells are hatched, computed for"
        f" nobody. Continuous takes {len(served['continuous'].rows)} steps, and no cell"
        " is hatched: the next request takes a slot as soon as one is free."
    ),
)

# %%
for way, run in served.items():
    compare(flat(run.tokens), flat(served["alone"].tokens), f"tokens, {way}", tol=0)
    print(f"  {len(run.rows)} passes; rows for somebody: {run.busy:.0%}")

# %% [markdown]
# **Iteration-level scheduling** is [Orca's](https://www.usenix.org/conference/osdi22/presentation/yu "yu2022orca") idea. **Dynamic** batching, between the two, does not wait until a batch is full: its first request waits for a delay at most. It helps when few come, and its batches still end with their longest.
#
# One thing is not solved yet. A new request brings a prompt, and the step that reads it takes $b$ seconds for each token, while all who decode wait. **Chunked prefill** ([Agrawal et al. 2024](https://arxiv.org/abs/2403.02310 "agrawal2024sarathi")) reads it in parts. vLLM's rule makes this simple, for it knows no phases. A request has
# $\text{left}$ tokens to compute before the next one can be written: 1 when it decodes, the rest of its text otherwise. A step has a budget of tokens.
#
# 1. Those that run come first, the oldest first; each gets $\min(\text{left}, \text{budget})$.
# 2. Each needs $\lceil (\text{computed} + n) / b_{size} \rceil$ blocks of $b_{size}$ tokens, less those it has. If there are none, the request that was admitted **last** is sent away: its blocks come back, and it will compute everything again (**pre-emption by recomputation**).
# 3. If nobody was sent away, those that wait come in, in order, while the budget, the slots and the blocks last. At the first that does not fit, stop.
#
# The oldest always gets its token, so it ends, and then another is the oldest: nobody starves.
#
# ## Your turn
#
# Rule 3. The first three lines are rules 1 and 2. A `Job` has `id`, `computed`, `left` and `blocks`; stop if there is no room, no budget, or no blocks for *all* that is left of the text. Without `limits.chunked` a prompt may not be cut.

# %%
blocks_needed = batching.blocks_needed


def my_schedule(running, waiting, available, limits):
    plan, budget, available = batching.give_running(running, available, limits)
    if plan.preempted or budget == 0:
        return plan
    raise NotImplementedError("a loop of yours, which ends in: return plan")


your_turn(check.schedule, my_schedule)


# %% tags=["hide-cell"]
# One way to write it.
def one_answer(running, waiting, available, limits):
    plan, budget, available = batching.give_running(running, available, limits)
    if plan.preempted:
        return plan
    room = limits.max_sequences - len(running)
    for job in waiting:
        count = min(job.left, budget)
        cut = count < job.left and not limits.chunked
        whole = blocks_needed(job, job.left, limits.block_size)
        if room == 0 or count == 0 or cut or whole > available:
            break
        available -= blocks_needed(job, count, limits.block_size)
        plan.tokens[job.id] = count
        plan.admitted.append(job.id)
        budget, room = budget - count, room - 1
    return plan


your_turn(check.schedule, one_answer)

# %% [markdown]
# ## The code
#
# Two that decode, one in the middle of its prompt, and one that waits; a budget of 40 tokens:

# %%
running = [
    Job(0, computed=50, left=1, blocks=4),
    Job(1, computed=64, left=90, blocks=4),
]
running += [Job(2, computed=7, left=1, blocks=1)]
waiting = [Job(3, computed=0, left=20)]
print(schedule(running, waiting, available=50, limits=Limits(max_tokens=40)))
print(schedule(running, waiting, available=50, limits=Limits(max_tokens=100)))

# %% tags=["hide-output"]
show(batching.blocks_needed, batching.give_running, schedule)

# %% [markdown]
# With 40 tokens the long prompt, admitted earlier, takes all that is left, and request 2 has to wait for a step: "decoding first" holds between those that run and those that come, not among those that run. vLLM plans the same.
#
# ## Against vLLM, and mathematics
#
# vLLM's scheduler runs without a model. Its plans for 32 small cases, until all requests have ended, are stored beside ours; so are the steps of OpenVINO GenAI on the real model.

# %%
data = published.vllm()
same = [published.plans_of(case) == case["steps"] for case in data["cases"]]
steps = sum(len(case["steps"]) for case in data["cases"])
gone = sum(len(step["preempted"]) for case in data["cases"] for step in case["steps"])
print(f"vLLM {data['vllm']}: {steps} steps, {gone} times a request was sent away")
compare(sum(same), len(same), "cases with the same plan in every step", tol=0)
other = published.first_part_is_enough
differ = [published.plans_of(case, other) != case["steps"] for case in data["cases"]]
print(f"if the first part of a prompt must fit only: {sum(differ)} cases differ")

service, load = 0.5, 0.8  # M/D/1: one at a time, each takes half a second
waits = []
for seed in range(6):
    arrivals = batching.poisson(load / service, 600, seed)
    requests = batching.trace(arrivals, [1] * 600, [1] * 600)
    one_by_one = simulate(requests, Cost(service, 0.0), Limits(max_sequences=1))
    waits.append(statistics.mean(one_by_one.latencies()[0]) - service)
theory = load * service / (2 * (1 - load))
error = statistics.stdev(waits) / len(waits) ** 0.5
print(f"mean wait by queueing theory {theory:.2f} s; within two errors of the mean of")
print(f"six runs: {abs(statistics.mean(waits) - theory) < 2 * error}")

# %% tags=["hide-cell"]
peer = published.openvino()
print(f"OpenVINO GenAI {peer['openvino-genai']}: steps until all have ended")
print(f"{'case':40}{'theirs':>7}{'ours':>6}{'same':>6}")
for case in peer["cases"]:
    ours = published.steps_of(case)
    alike = "yes" if ours == case["steps"] else "no"
    print(f"{case['name']:40}{len(case['steps']):7}{len(ours):6}{alike:>6}")

# %% [markdown]
# | | Orca | vLLM 0.32 | OpenVINO GenAI 2026.4 | ours |
# |---|---|---|---|---|
# | a prompt beside decoding | whole | in parts | in parts | in parts |
# | a prompt comes in if there are blocks | for its longest text | for the prompt | for its first part | for the prompt |
# | most requests at once | its limit | `max_num_seqs` | no limit: `max_num_seqs` is not looked at | `max_sequences` |
# | without parts | – | decoding goes on | prompts first, decoding waits | decoding goes on |
# | sent away | nobody | the last; computes all again | the last; one step more than ours | the last; computes all again |
#
# Orca sets memory for the longest text aside, so nobody is ever sent away. OpenVINO's column is what six cases showed on its CPU plug-in. The project's tests also compare texts with those of `generate_batch` in transformers 5.23, and hold every way of batching to Little's law: requests in the system, on average, are the rate of arrivals times the mean stay.
#
# ## The experiment
#
# First the twelve requests, three times on one core, stored. Then 80 requests in **virtual time**, where a step takes what the fitted line says: they come one per second on average, as a Poisson process; prompts have 120 tokens on average and answers 40, both log-normal; 16 slots; three seeds. Users wait for two things: the first token (**TTFT**, from the moment at which they ask), and each
# next one (**ITL**, inter-token latency). Means hide what annoys, so we look at the 90th percentile of the first and at the 99th of the second.

# %% tags=["hide-input"]
taken = {
    way: [
        float(r["seconds"]) for r in runs if (r["task"], r["method"]) == ("serve", way)
    ]
    for way in ("alone", "static", "continuous")
}
for way, times in taken.items():
    print(f"{way:11}{min(times):5.1f} … {max(times):4.1f} s")


def requests_of(seed: int, rate: float = 1.0, count: int = 80):
    return batching.trace(
        batching.poisson(rate, count, seed),
        batching.lognormal(120, count, longest=1000, seed=seed),
        batching.lognormal(40, count, longest=300, seed=seed + 100),
    )


whole = Limits(max_tokens=4096, max_sequences=16, chunked=False)
WAYS = {
    "one at a time": lambda r: in_batches(r, cost, 1),
    "static": lambda r: in_batches(r, cost, 16),
    "dynamic, 2 s": lambda r: in_batches(r, cost, 16, delay=2.0),
    "continuous": lambda r: simulate(r, cost, whole),
}
for tokens in (256, 64, 32):
    WAYS[f"parts of {tokens}"] = lambda r, n=tokens: simulate(r, cost, Limits(n, 16))
results = {
    name: [way(requests_of(seed)) for seed in range(3)] for name, way in WAYS.items()
}


def spread(name: str, of) -> str:
    """The least and the most of three seeds."""
    values = [of(served) for served in results[name]]
    digits = 0 if min(values) >= 10 else 1 if min(values) >= 1 else 2
    return f"{min(values):.{digits}f} … {max(values):.{digits}f}"


def ttft(served) -> float:
    return percentile(served.latencies()[0], 90)


def itl(served) -> float:
    return percentile(served.latencies()[1], 99)


print(f"\n{'':16}{'tokens/s':>14}{'TTFT p90, s':>16}{'ITL p99, s':>16}")
for name in results:
    row = f"{spread(name, lambda s: s.throughput):>14}{spread(name, ttft):>16}"
    print(f"{name:16}{row}{spread(name, itl):>16}")

# %% tags=["hide-cell"]
faster_guess.settle(min(taken["static"]) / min(taken["continuous"]), digits=2)
static_guess.settle("slower")

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(4.8, 2.8))
names = ["one at a time", "static", "dynamic, 2 s", "continuous"]
for row, name in enumerate(names):
    rates = [served.throughput for served in results[name]]
    color = palette.green if name == "continuous" else palette.gray
    axes[0].barh(row, statistics.mean(rates), color=color, height=0.6)
    axes[0].plot(rates, [row] * 3, "o", color=palette.ink, markersize=3)
axes[0].set_yticks(range(4), ["one", "static", "dynamic", "contin."])
axes[0].set(ylim=(3.5, -0.5), xlabel="tokens per second")
for name in [n for n in results if n.startswith(("cont", "parts"))]:
    x = [ttft(served) for served in results[name]]
    y = [itl(served) for served in results[name]]
    color = palette.green if name == "continuous" else palette.blue
    axes[1].plot(x, y, "o", color=color, markersize=4)
    label = "whole" if name == "continuous" else name.split()[-1]
    at = (max(x), statistics.mean(y))
    axes[1].annotate(label, at, (5, 0), textcoords="offset points", va="center")
axes[1].set(xlabel="TTFT p90, s", ylabel="ITL p99, s", ylim=(0, 1.6), xlim=(0, 24))
figure(
    fig,
    alt=(
        "Left, tokens per second: one at a time about 12, static and dynamic 7 to 9,"
        " continuous about 36. Right, each dot a seed: prompts read whole have a p99"
        " between tokens of more than a second, and 90% of first tokens within five"
        " seconds; with smaller parts the gaps shrink to a quarter of a second and"
        " first tokens come later, up to 17 seconds with parts of 32."
    ),
)

# %% [markdown]
# Continuous batching writes four times as many tokens per second as static batching, or more (the 80 requests), and it could write still more: it waits for requests to come. On one core a static batch is even *slower* than no batch: a row in vain costs its time, too, and most were: two of three with the twelve requests, and about three of four with the 80, where prompts and caches are also padded to the longest of the batch. On a GPU, where $b$ is small beside $a$, the batch would gain, and its empty seats would be just as empty.
#
# **Parts** are a bargain at first: with 64 tokens in a step the gaps shrink to a third or less, and the throughput is the same. They are paid for by first tokens, which come later. With 32 that price is high: if 16 requests decode, 16 tokens of a step are left for prompts, and the queue grows.
# A prompt in parts also looks back at its own beginning in each step; here that is little.
#
# ## Two machines: apart or together?
#
# The last way to keep prompts from stopping texts is to read them elsewhere ([DistServe](https://arxiv.org/abs/2401.09670 "zhong2024distserve"), [Splitwise](https://arxiv.org/abs/2311.18677 "patel2024splitwise")). Two real processes: one reads prompts and sends keys, values and the first token; the other writes.


# %%
def two(comm):
    memory = PagedCache(real.config, BlockManager(40, 16))
    if comm.rank == 0:
        return batching.prefill_rank(comm, real, memory, prompts[:3])
    return batching.decode_rank(comm, real, memory, outputs[:3])


sent, tokens = launch(two, 2, timeout=60)
alone = flat(served["alone"].tokens[:3])
compare(flat(tokens), alone, "tokens of two processes", tol=0)
shape = (real.config.num_hidden_layers, real.config.num_key_value_heads, 64)
formula = batching.moved_bytes(sum(map(len, prompts[:3])), *shape, bytes_each=4)
compare(sent, formula, "bytes sent, by 07/01's formula", tol=0)

# %% tags=["hide-input"]
per_token = batching.moved_bytes(1, *shape, 4)
pair = {
    "together, whole prompts": lambda r: batching.simulate_together(r, cost, whole),
    "together, parts of 64": lambda r: batching.simulate_together(
        r, cost, Limits(64, 16)
    ),
}
for name, rate in (("1 GB/s", 1e9), ("100 MB/s", 1e8), ("10 MB/s", 1e7)):
    pair[f"apart, {name}"] = lambda r, x=rate: batching.simulate_apart(
        r, cost, whole, Link(x, per_token)
    )
print(f"two machines, 1.6 requests per second; a token moves {per_token / 1e3:.0f} kB")
print(f"{'':26}{'tokens/s':>12}{'TTFT p90, s':>16}{'ITL p99, s':>16}")
for name, way in pair.items():
    results[name] = [way(requests_of(seed, 1.6)) for seed in range(3)]
    row = f"{spread(name, lambda s: s.throughput):>12}{spread(name, ttft):>16}"
    print(f"{name:26}{row}{spread(name, itl):>16}")

# %% [markdown]
# Apart, with a fast link, the gaps are the shortest of all, and nobody had to choose a size of parts. The price: first tokens come later than with whole prompts on both machines, as one machine reads all of them while the other cannot help. With 100 MB/s the transfer has eaten the gain, and with 10 MB/s each text stops after its first token until its cache has come. The throughput hardly
# changes: both pairs keep up with what comes.
#
# ## Play
#
# One machine and one trace: what does the budget of tokens in a step decide? The dashed lines are the percentiles of the table: 90 for first tokens, 99 for gaps.

# %% tags=["hide-input", "slider", "nbval-ignore-output"]
SLIDERS = {"budget": [32, 48, 64, 128, 512], "rate": [0.5, 1.0]}
grid = {
    (n, rate): simulate(requests_of(0, rate), cost, Limits(n, 16))
    for n in SLIDERS["budget"]
    for rate in SLIDERS["rate"]
}


def draw(budget: int, rate: float):
    first, gaps = grid[budget, rate].latencies()
    fig, axes = plt.subplots(1, 2, figsize=(4.8, 2.4), sharey=True)
    for ax, values, name, most, q in (
        (axes[0], first, "TTFT, s", 20, 90),
        (axes[1], gaps, "ITL, s", 1.5, 99),
    ):
        shares = [100 * (i + 1) / len(values) for i in range(len(values))]
        ax.plot(sorted(values), shares, color=palette.blue)
        ax.axvline(percentile(values, q), color=palette.vermillion, linestyle="--")
        ax.set(xlim=(0, most), ylim=(0, 101), xlabel=name)
    axes[0].set_ylabel("% below")
    fig.suptitle(
        f"{percentile(first, 90):.1f} s to the first,"
        f" {percentile(gaps, 99):.2f} s between"
    )
    return fig


def missing(budget: int, rate: float) -> str:
    if rate != 1.0:
        return "one request per second is asked."
    if itl(grid[budget, rate]) > 0.3:
        return f"99% of the gaps are below {itl(grid[budget, rate]):.2f} s."
    good = [n for n in SLIDERS["budget"] if itl(grid[n, rate]) <= 0.3]
    first = min(good, key=lambda n: ttft(grid[n, rate]))
    return "" if budget == first else "another budget brings first tokens sooner."


explore(
    draw,
    alt=lambda budget, rate: (
        f"Budget {budget}, {rate} requests per second: 90% of first tokens come within"
        f" {ttft(grid[budget, rate]):.1f} s, 99% of gaps are below"
        f" {itl(grid[budget, rate]):.2f} s."
    ),
    title="How many tokens in a step?",
    challenge=(
        "One request per second, 99% of the gaps at most 0.3 s: which budget brings"
        " first tokens soonest?"
    ),
    missing=missing,
    start={"budget": 512, "rate": 0.5},
    **SLIDERS,
)

# %% [markdown]
# ## At scale
#
# Llama 3.1 8B in 16 bits on one H100, by its data sheet: 16 GB of weights at [3.35 TB/s](https://www.nvidia.com/en-us/data-center/h100/ "nvidia2023h100"), and half of 989 TFLOP/s.

# %%
llama = preset("llama-3.1-8b")
shape = llama.num_hidden_layers, llama.num_key_value_heads, llama.head_dim
moved = batching.moved_bytes(1, *shape, bytes_each=2)
gpu = Cost(a=16e9 / 3.35e12, b=2 * 8e9 / (989e12 / 2), c=moved / 3.35e12)
print(f"a {1e3 * gpu.a:.1f} ms, b {1e6 * gpu.b:.0f} µs: a step may have", end=" ")
print(f"{gpu.a / gpu.b:.0f} tokens before they take as long as the weights")
for tokens in (128, 512, 2048, 8192):
    print(f"  {tokens:5} tokens in a step: {1e3 * gpu.seconds(tokens, 0):5.1f} ms")
prompt = 2000 * moved
print(f"2,000 tokens move {prompt / 1e6:.0f} MB: {1e3 * prompt / 50e9:.0f} ms", end=" ")
print(f"at 50 GB/s, {1e3 * prompt / 1.25e9:.0f} ms at 1.25 GB/s")

# %% [markdown]
# Published, each beside its own baseline, none of which we can repeat here:
#
# | | on | gain |
# |---|---|---|
# | [Orca](https://www.usenix.org/conference/osdi22/presentation/yu "yu2022orca") | GPT-3 175B | 36.9 times the throughput of FasterTransformer, at the same latency |
# | [Sarathi-Serve](https://arxiv.org/abs/2403.02310 "agrawal2024sarathi") | Mistral-7B, one A100 | up to 2.6 times, within bounds for latency |
# | [DistServe](https://arxiv.org/abs/2401.09670 "zhong2024distserve") | several models | 7.4 times the requests, or bounds 12.6 times tighter |
# | [Splitwise](https://www.microsoft.com/en-us/research/publication/splitwise-efficient-generative-llm-inference-using-phase-splitting/ "patel2024splitwise") | clusters | 1.4 times the throughput at 20% lower cost |
#
# In vLLM 0.32 (flags read by its own parser), and a pair that is apart:
#
# ```bash
# vllm serve meta-llama/Llama-3.1-8B-Instruct --max-num-batched-tokens 2048 \
#   --max-num-seqs 128 --enable-chunked-prefill --watermark 0.01
# vllm serve meta-llama/Llama-3.1-8B-Instruct --port 8100 --kv-transfer-config \
#   '{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}'
# vllm serve meta-llama/Llama-3.1-8B-Instruct --port 8200 --kv-transfer-config \
#   '{"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}'
# ```
#
# A router must stand before the two. vLLM's documentation says it plainly: this [does not improve throughput](https://docs.vllm.ai/en/latest/features/disagg_prefill/ "vllm2026disaggregated"); it holds the gaps down.
#
# ## What to keep
#
# ```python
# for job in running:                       # the oldest first
#     count = min(job.left, budget)         # 1, or a part of its prompt
#     while blocks_needed(job, count, b) > available:
#         available += send_away(running[-1])
# # then those that wait, in order, until one does not fit
# ```
#
# **Use it** wherever requests come one by one. Set the budget of tokens by the gap that readers accept. **Do not** expect it to help a single user, or a batch job whose texts are all equally long; go apart only with a fast link and enough requests for both machines.
#
# <details><summary>Why is nobody admitted in a step that sends somebody away?</summary>
#
# The one who was sent away waits at the front, and would come back at once, or another would take the blocks that were just made free.
#
# </details>
#
# <details><summary>Why did very small parts hurt first tokens so much?</summary>
#
# All who decode take a token of the budget first. What they leave is all that prompts get, and the queue grows.
#
# </details>
#
# <details><summary>Why must there be blocks for the whole prompt, if it comes in parts?</summary>
#
# Two long prompts could begin and then stand in each other's way: the second is sent away, and all that it has computed is lost.
#
# </details>
#
# Now write it yourself: [the exercises](../../work/07-inference/04-continuous-batching.ipynb). The engine of this part runs on your scheduler.
#
# **Further reading.** [Yu et al. 2022](https://www.usenix.org/conference/osdi22/presentation/yu "yu2022orca"), sections 3 and 4; [Agrawal et al. 2023](https://arxiv.org/abs/2308.16369 "agrawal2023sarathi"), where parts come from.
