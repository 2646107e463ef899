# %% [markdown]
# # Solutions: Precision, power and cost
#
# Four sums that decide more than a data sheet: what a product takes in joules, what a token costs, how often to save, and what a run emits. Nothing in them is difficult but the units.
#
# Stuck? `check.hint("product_energy")` shows a hint, and the next one when it is called again.

# %%
from llmlab.checks.chips.precision_power_cost import check

# %% [markdown]
# ## Exercise 1: product_energy
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# A chip multiplies $x$ $(m, k)$ by $W$ $(k, n)$. Return the joules of three parts:
#
# 1. arithmetic: $m k n$ products, each with its sum, at `mac_pj` picojoules for both together;
# 2. the chip's own memory: each product takes an operand of $x$ and one of $W$; once fetched, an operand is used `tile` times;
# 3. the large memory: $x$ and $W$ are read once, the result is written once.
#
# Every number has `number_bytes` bytes. Prices are in picojoules per byte, and a picojoule is $10^{-12}$ J.


# %% tags=["exercise"]
def product_energy(
    m: int,
    k: int,
    n: int,
    number_bytes: float,
    tile: int,
    mac_pj: float,
    chip_pj_per_byte: float,
    memory_pj_per_byte: float,
) -> tuple[float, float, float]:
    """Joules of arithmetic, of the chip's memory, and of the large memory."""
    # BEGIN SOLUTION
    macs = m * k * n
    fetched = 2 * macs / tile * number_bytes
    moved = (m * k + k * n + m * n) * number_bytes
    return (
        macs * mac_pj * 1e-12,
        fetched * chip_pj_per_byte * 1e-12,
        moved * memory_pj_per_byte * 1e-12,
    )
    # END SOLUTION


# %% tags=["check"]
check.product_energy(product_energy)

# %% [markdown] tags=["solution"]
# With one row every number of $W$ travels from far away for a single product, and arithmetic is a rounding error in the bill. Two things change that: more rows, which share the third part, and a larger tile, which divides the second. A systolic array is a large tile.

# %% [markdown]
# ## Exercise 2: token_prices
# ●○○○○ difficulty · ●●●●● importance · 8 minutes · 2 points
#
# You rent `gpus` GPUs for `dollars_per_gpu_hour` each. Together they read `read_per_second` tokens while they read prompts, or write `written_per_second` while they write. In the share `busy` of each hour there is somebody to serve; the rest of the hour is paid for as well. Return the dollars per million tokens in, and per million tokens out.


# %% tags=["exercise"]
def token_prices(
    gpus: int,
    dollars_per_gpu_hour: float,
    read_per_second: float,
    written_per_second: float,
    busy: float,
) -> tuple[float, float]:
    """Dollars per million tokens in, and out."""
    # BEGIN SOLUTION
    hour = gpus * dollars_per_gpu_hour
    tokens_in = read_per_second * busy * 3600
    tokens_out = written_per_second * busy * 3600
    return hour / tokens_in * 1e6, hour / tokens_out * 1e6
    # END SOLUTION


# %% tags=["check"]
check.token_prices(token_prices)

# %% [markdown] tags=["solution"]
# With eight GPUs at 2 dollars, 73,700 tokens per second in or 14,800 out, and never idle, it gives 6 cents in and 30 cents out: these are [DeepSeek's figures](https://github.com/deepseek-ai/open-infra-index/blob/main/202502OpenSourceWeek/day_6_one_more_thing_deepseekV3R1_inference_system_overview.md "deepseek2025inference"). Prices of services have this shape for a reason. And `busy` is a factor like any other: machines that wait through the night cost as much as slow ones.

# %% [markdown]
# ## Exercise 3: checkpoint_plan
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# Others report `failures` in so many `days` on `gpus` GPUs. Your job runs on `my_gpus` of the same kind and stops when any of them fails. Each checkpoint stops it for `writing_seconds`; each failure for `restart_minutes`, and half an interval of work is lost on average. Return
#
# 1. the mean hours between failures of your job, $M$;
# 2. Young's interval between checkpoints, $\tau = \sqrt{2 \delta M}$, in minutes;
# 3. the share of the time that is lost then: $\delta/\tau + (\tau/2 + R)/M$.


# %% tags=["exercise"]
def checkpoint_plan(
    failures: float,
    days: float,
    gpus: int,
    my_gpus: int,
    writing_seconds: float,
    restart_minutes: float,
) -> tuple[float, float, float]:
    """Hours between failures, minutes between checkpoints, and the share lost."""
    # BEGIN SOLUTION
    between = days * 24 / failures * gpus / my_gpus
    writing, restart = writing_seconds / 3600, restart_minutes / 60
    every = (2 * writing * between) ** 0.5
    lost = writing / every + (every / 2 + restart) / between
    return between, every * 60, lost
    # END SOLUTION


# %% tags=["check"]
check.checkpoint_plan(checkpoint_plan)

# %% [markdown] tags=["solution"]
# Four units come in and three go out; all of them become hours first. The restart is in the share, but not in the interval: it comes with each failure, however often one saves. With eight times as many GPUs one saves $\sqrt 8$ times as often, and loses $\sqrt 8$ times as much.

# %% [markdown]
# ## Exercise 4: footprint
# ●●○○○ difficulty · ●●●○○ importance · 10 minutes · 2 points
#
# A run takes `gpu_hours` on GPUs of `watts` each, in a building with a `pue` (its power over that of its computers), on a grid that emits `grams_per_kwh`. To make one GPU, `gpu_kg` kilograms were emitted. It lives for `life_years`, of 8766 hours each, and in the share `busy` of them somebody uses it. Return tonnes (1000 kg): those from running, and the run's part of those from making.


# %% tags=["exercise"]
def footprint(
    gpu_hours: float,
    watts: float,
    pue: float,
    grams_per_kwh: float,
    gpu_kg: float,
    life_years: float,
    busy: float,
) -> tuple[float, float]:
    """Tonnes from running, and from making."""
    # BEGIN SOLUTION
    kwh = gpu_hours * watts / 1000 * pue
    running = kwh * grams_per_kwh / 1e6
    used_life = life_years * 8766 * busy
    made = gpu_kg / 1000 * gpu_hours / used_life
    return running, made
    # END SOLUTION


# %% tags=["check"]
check.footprint(footprint)

# %% [markdown] tags=["solution"]
# On a dirty grid making hardly counts; on a clean one it may be the larger part, and then an idle GPU is worse than a hungry one. Both numbers belong into a report, each with the two or three assumptions that made it.
