# %% [markdown]
# # Solutions: Model server
#
# Four functions of a model server: when a batch leaves, how a tensor arrives, how models are joined, and which delay one may set.
#
# Stuck? `check.hint("next_batch")` shows a hint, and the next one when it is called again.

# %%
import math

import numpy as np

from llmlab.checks.inference.model_server import check
from llmlab.inference.model_server import NUMPY

# %% [markdown]
# ## Exercise 1: next_batch
# ●●●●○ difficulty · ●●●●● importance · 25 minutes · 4 points
#
# An instance of the model is free, and asks what to run. `queue` holds the requests that wait, the oldest first. Each has `arrived` (a time), `size` (the inferences in it) and `shape`. `batching` has `preferred` (sizes, rising,
# at least one), `delay` (seconds) and `max_batch`.
#
# The **front** is the longest run of requests at the head of the queue that have the shape of the first and together at most `max_batch` inferences. (No request is larger than `max_batch`.) The first rule that applies decides:
#
# 1. `delay` is above 0, and at `now` the oldest has waited for `delay` or longer: the whole front leaves.
# 2. The first so many requests of the front make up a preferred size exactly: they leave. Of several preferred sizes the largest counts.
# 3. One more request of the queue would bring the sum of sizes above the largest preferred size: all before the first such request leave.
# 4. The front cannot grow, as the queue goes on with a request that does not fit, or its sum has reached the largest preferred size: the whole front leaves.
# 5. `delay` is 0: the whole front leaves.
# 6. All wait.
#
# Return `(count, None)` where `count` *requests* leave, `(0, when)` where all wait, with the time at which the oldest will have waited for `delay`, and `(0, None)` for an empty queue. Change nothing.


# %% tags=["exercise"]
def next_batch(queue, now, batching):
    """(requests that leave now, None), or (0, when to ask again)."""
    # BEGIN SOLUTION
    if not queue:
        return 0, None
    due = queue[0].arrived + batching.delay
    late = batching.delay > 0 and now >= due
    largest = batching.preferred[-1]
    total = count = best = 0
    stopped = False
    for request in queue:
        total_with = total + request.size
        if count and best == 0 and total_with > largest:
            best = count
        fits = total_with <= batching.max_batch and request.shape == queue[0].shape
        if count and not fits:
            stopped = True
            break
        total = total_with
        count += 1
        if total in batching.preferred:
            best = count
    if late:
        return count, None
    if best:
        return best, None
    if stopped or total >= largest or batching.delay == 0:
        return count, None
    return 0, due
    # END SOLUTION


# %% tags=["check"]
check.next_batch(next_batch)

# %% [markdown] tags=["solution"]
# The rule looks at nothing but the queue and the time, so it can be tested without waiting, and simulated. A late request breaks the wish for a preferred size: a wish is about speed, the delay is a promise. Without a preferred size in
# the configuration, Triton takes `max_batch` for it: then a batch waits until it is full, or late.

# %% [markdown]
# ## Exercise 2: read_tensor
# ●●○○○ difficulty · ●●●○○ importance · 12 minutes · 2 points
#
# A tensor arrives as JSON: `{"name": "X", "datatype": "FP32", "shape": [2, 3], "data": […]}`. Make the NumPy array of it. `NUMPY` gives the dtype of a datatype.
#
# - `data` holds the elements in row-major order, perhaps in nested lists. How they are nested does not matter, only their order.
# - `BYTES` are texts in JSON. In the array they are `bytes`, in UTF-8, and the dtype is `object`.
# - Raise a `ValueError` for a datatype that `NUMPY` does not have, and where the number of elements is not that of the shape.


# %% tags=["exercise"]
def read_tensor(entry):
    """The array of a tensor in KServe's JSON."""
    # BEGIN SOLUTION
    datatype, shape = entry["datatype"], entry["shape"]
    if datatype not in NUMPY:
        raise ValueError(f"the datatype {datatype!r} is not known")

    def flatten(data):
        found = []
        for value in data:
            found += flatten(value) if isinstance(value, list) else [value]
        return found

    data = flatten(entry["data"])
    if len(data) != math.prod(shape):
        raise ValueError(f"{len(data)} elements for the shape {shape}")
    if datatype == "BYTES":
        data = [text.encode() for text in data]
    return np.array(data, dtype=NUMPY[datatype]).reshape(shape)
    # END SOLUTION


# %% tags=["check"]
check.read_tensor(read_tensor)

# %% [markdown] tags=["solution"]
# The number of elements must be held to the shape *before* an array is made: a client's shape is a claim, not a fact. The datatype decides, not what the numbers look like: `[1, 2, 3]` may be FP32. Whole numbers must not pass through a float, as
# 2⁵³ + 1 does not survive it.

# %% [markdown]
# ## Exercise 3: run_ensemble
# ●●●○○ difficulty · ●●●●○ importance · 18 minutes · 3 points
#
# `steps` are the models of an ensemble. `step.inputs` maps a model's own input to the name of a tensor of the ensemble, `step.outputs` a model's own output to such a name. `tensors` holds the ensemble's inputs.
#
# Run each step once, when all its inputs are there, in any order that allows it. `infer(step, given)` runs a model: `given` holds its inputs, and no others, by its own names, and it returns outputs by its own names, perhaps more than `step.outputs` asks for. Return a
# new dict with all tensors of the ensemble by name, the inputs among them. If steps are left whose inputs never come, raise a `ValueError`.


# %% tags=["exercise"]
def run_ensemble(steps, tensors, infer):
    """All tensors by the ensemble's names."""
    # BEGIN SOLUTION
    found = dict(tensors)
    left = list(steps)
    while left:
        ready = [s for s in left if all(name in found for name in s.inputs.values())]
        if not ready:
            raise ValueError(f"inputs of {[step.model for step in left]} never come")
        step = ready[0]
        left.remove(step)
        given = {own: found[name] for own, name in step.inputs.items()}
        made = infer(step, given)
        for own, name in step.outputs.items():
            found[name] = made[own]
    return found
    # END SOLUTION


# %% tags=["check"]
check.run_ensemble(run_ensemble)

# %% [markdown] tags=["solution"]
# Nowhere is written which step follows which: names say it. That makes a model reusable, as its own names stay its own, and lets a server run steps at the same time that do not need each other. A circle shows itself when nothing is ready and
# something is left.

# %% [markdown]
# ## Exercise 4: choose_delay
# ●●○○○ difficulty · ●●●●○ importance · 12 minutes · 2 points
#
# `latencies` holds, for each delay, what requests waited in a load test. Return the longest delay whose percentile is at most `bound`: it needs the fewest executions. Return `None` if no delay does it. The percentile is the smallest of the measured values that at least
# `percent` of a hundred requests do not exceed; no interpolation.


# %% tags=["exercise"]
def choose_delay(latencies, bound, percent=99):
    """The longest delay with which `percent` of the requests stay within `bound`."""
    # BEGIN SOLUTION
    good = []
    for delay, values in latencies.items():
        rank = math.ceil(len(values) * percent / 100)
        if sorted(values)[rank - 1] <= bound:
            good.append(delay)
    return max(good, default=None)
    # END SOLUTION


# %% tags=["check"]
check.choose_delay(choose_delay)

# %% [markdown] tags=["solution"]
# A mean would hide the slow ones, and the maximum is one request's bad luck. Rounding the rank up keeps the promise: with 150 requests 149 must be within the bound, as 148 are not yet 99%. All delays are looked at, for measured percentiles do not
# rise evenly.
