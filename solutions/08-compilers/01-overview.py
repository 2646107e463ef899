# %% [markdown]
# # Solutions: Overview
#
# Three pieces of a compiler from Python to machine code, and the one that decides when to compile. An `Expression` is one operation:
#
# | attribute | holds |
# |---|---|
# | `op` | `"argument"`, `"constant"`, or what it does: add, sub, mul, div, maximum, minimum, sqrt, exp, tanh |
# | `inputs` | the expressions that it reads, in their order |
# | `value` | of a constant its number, of an argument its place in the call |
#
# Stuck? `check.hint("linearise")` shows a hint, and the next one when it is called again.

# %%
from collections.abc import Callable, Sequence

import torch

from llmlab.checks.compilers.overview import check
from llmlab.compilers.overview import (
    FUNCTIONS_OF_LLVM,
    INSTRUCTIONS,
    Expression,
    literal,
    loop_of,
    maximum,
    minimum,
    run_with,
)

# %% [markdown]
# ## Exercise 1: linearise
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Return a list of all expressions that `result` needs, itself included: arguments and constants, too. Each *object* stands there once, however many read it, and after all that it reads. Two objects that look alike stay two.


# %% tags=["exercise"]
def linearise(result: Expression) -> list[Expression]:
    """Each expression once, after those that it reads."""
    # BEGIN SOLUTION
    order = []

    def visit(node: Expression) -> None:
        if node in order:
            return
        for each in node.inputs:
            visit(each)
        order.append(node)

    visit(result)
    return order
    # END SOLUTION


# %% tags=["check"]
check.linearise(linearise)

# %% [markdown] tags=["solution"]
# This order (inputs first, then the node) is called post-order. `node in order` looks through the whole list, so the time grows with its square; the package's own keeps a dict, and a stack of its own in place of the calls, for Python stops at a depth of about a thousand.

# %% [markdown]
# ## Exercise 2: lower
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# Turn such a list into LLVM IR. Return the lines and the name of the last value, `(lines, result)`.
#
# 1. Argument $i$ (its `value`) has the name `%x` with its number, as `%x0`, and no line: the loop loads it.
# 2. A constant has the name `literal(value)`, and no line.
# 3. Any other gets a line and a new name, as `%v0`, `%v1`. If its operation is in `INSTRUCTIONS`: `%v0 = fadd float %x0, %x1`. If it is in `FUNCTIONS_OF_LLVM`, which has the names without `@`: `%v1 = call float @llvm.exp.f32(float %v0)`, with as many `float …` as it has inputs.


# %% tags=["exercise"]
def lower(program: Sequence[Expression]) -> tuple[list[str], str]:
    """A line per operation, and the name of the last value."""
    # BEGIN SOLUTION
    lines = []
    names = {}
    for node in program:
        operands = [names[each] for each in node.inputs]
        if node.op == "argument":
            names[node] = f"%x{int(node.value)}"
        elif node.op == "constant":
            names[node] = literal(node.value)
        else:
            names[node] = f"%v{len(lines)}"
            if node.op in INSTRUCTIONS:
                what = f"{INSTRUCTIONS[node.op]} float {', '.join(operands)}"
            else:
                given = ", ".join(f"float {each}" for each in operands)
                what = f"call float @{FUNCTIONS_OF_LLVM[node.op]}({given})"
            lines.append(f"{names[node]} = {what}")
    return lines, names[program[-1]]
    # END SOLUTION


# %% tags=["check"]
check.lower(lower)

# %% [markdown] tags=["solution"]
# Each name is given once, which is what **static single assignment** means, so the dict from nodes to names is all the state there is. `literal` writes bits, for no float32 equals 0.1, and LLVM refuses a number that it would have to round.

# %% [markdown]
# ## Exercise 3: smooth_gate
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# A function of your own as machine code. The lesson's gate, the hard swish of MobileNetV3 ([Howard et al. 2019](https://arxiv.org/abs/1905.02244 "howard2019searching")), has two corners; this one has none. With $y = x + b$ and $t = \min(\max(y + 3,\, 0),\, 6)\, /\, 6$, compute $y \cdot t^2 (3 - 2t)$. Use `+`, `-`, `*`, `maximum` and `minimum`: `x` and `b` are expressions, with which Python's `max`, `min` and `**` can do nothing. The check compiles it, runs it on this CPU, and reads its assembly for AVX2: no division may be left, no call, and at most 20 instructions in the loop.


# %% tags=["exercise"]
def smooth_gate(x: Expression, b: Expression) -> Expression:
    """A swish without corners, after a bias."""
    # BEGIN SOLUTION
    y = x + b
    t = minimum(maximum(y + 3, 0), 6) * (1 / 6)
    return y * (t * t * (3 - 2 * t))
    # END SOLUTION


# %% tags=["check"]
check.smooth_gate(smooth_gate)

# %% [markdown]
# Now run it: your function, compiled by your own `linearise` and `lower`, and by LLVM from there. At $y = -4, 1, 4$ it gives −0, 20/27 and 4.

# %%
print(
    run_with(linearise, lower, smooth_gate, torch.tensor([-4.0, 1, 4]), torch.zeros(3))
)

# %% [markdown]
# Here is the loop that the CPU runs, eight numbers per trip. Your 3 and 6 are not in it: they wait in registers that were loaded before. Then ask for `loop_of(smooth_gate, "AArch64, NEON")`.

# %%
print(loop_of(smooth_gate))

# %% [markdown] tags=["solution"]
# A compiler may not write $y \cdot \frac16$ for $y / 6$: for some $y$ the last bit differs, and it must not change results unasked. The one who wrote the formula may. $t$ is read three times and computed once: it is one object. On x86 the maximum takes three instructions, for `vmaxps` alone would drop a NaN; AArch64 has one instruction, `fmax`, that keeps it.

# %% [markdown]
# ## Exercise 4: guarded_call
# ●●●●○ difficulty · ●●●●● importance · 20 minutes · 4 points
#
# When is a compiled version right for a call? `compile(*arguments)` gives a function that is right for arguments *like these*: tensors of the same shape and dtype, and of everything else the same type and value (1, 1.0 and True are three). Write what happens at one call of a function that is compiled for what it is called with. `versions` is a dict, empty at first, that you fill and that comes back with the next call; its keys and values are yours.
#
# 1. If there is a version for such arguments, return its answer.
# 2. If not, and there are fewer than `limit` versions, compile one, keep it, and return its answer.
# 3. If there is no room for one more, return the answer of `function(*arguments)`, as it stands. No version is thrown away.


# %% tags=["exercise"]
def guarded_call(
    function: Callable, compile: Callable, limit: int, versions: dict, arguments: tuple
):
    """What `function(*arguments)` gives, by a version made for such arguments."""
    # BEGIN SOLUTION
    key = tuple(
        (each.shape, each.dtype)
        if isinstance(each, torch.Tensor)
        else (type(each), each)
        for each in arguments
    )
    if key not in versions and len(versions) < limit:
        versions[key] = compile(*arguments)
    return versions.get(key, function)(*arguments)
    # END SOLUTION


# %% tags=["check"]
check.guarded_call(guarded_call)

# %% [markdown] tags=["solution"]
# This is torch.compile's cache in small. The real one also guards global settings, the code of functions that are called, strides and aliases, tries the versions one after the other instead of making a key, and, when a shape changes, compiles a version for *any* size. Its limit is 8; after that it runs the function as it stands, and says so in a log only.
