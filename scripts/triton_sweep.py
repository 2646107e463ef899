"""What Triton makes of the course's kernels for GPUs that are not here.

    python scripts/triton_sweep.py             compiles what the file lacks
    python scripts/triton_sweep.py --check 3   compiles the first 3 again, and compares

Everything goes to llmlab/compilers/data/triton.json: per kernel and target the products
of the tensor cores, kinds of instructions, layouts, shared memory and registers; for
the mlp's usual tile also what each of its lines became. It took six minutes on two
cores, and gives the same on any CPU.
"""

from __future__ import annotations

from importlib.metadata import version

from sweeping import asked

from llmlab.compilers.triton_kernels import reading, stored
from llmlab.compilers.triton_kernels.compiling import TARGETS, Job, compile_jobs

LIT = ("sm_80", "sm_90", "sm_100", "gfx942")
BY_LINE = [Job("mlp_tile", target, warps=8) for target in LIT]


def jobs() -> list[Job]:
    """One product per target and type, the kernels, and candidates for the tuner."""
    listed = [Job("one_dot", target) for target in TARGETS]
    for dtype in ("bf16", "fp32", "fp8e4nv"):
        listed += [Job("one_dot", target, dtype) for target in LIT]
    listed += [Job("dots_by_descriptor", target, warps=8) for target in LIT]
    listed += BY_LINE
    listed += [Job("attention_tile", target) for target in LIT]
    listed += [Job("softmax_rows", target) for target in LIT]
    tiles = (
        (16, 64, 64, 4, 4),
        (32, 64, 64, 4, 3),
        (64, 64, 32, 4, 3),
        (64, 64, 64, 4, 4),
        (64, 128, 64, 4, 3),
        (128, 64, 64, 4, 3),
        (128, 128, 32, 4, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 3),
        (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4),
        (256, 256, 64, 8, 3),
    )
    for target in ("sm_80", "sm_90"):
        for rows, cols, depth, warps, stages in tiles:
            sizes = {"ROWS": rows, "COLS": cols, "DEPTH": depth}
            listed.append(Job("mlp_tile", target, "fp16", warps, stages, sizes))
    return listed


def made(job: Job) -> dict:
    """The facts of one job, or that it was refused."""
    try:
        compiled = compile_jobs([job], sass=True)[0]
    except RuntimeError as refusal:
        return stored.refused(job, str(refusal))
    return reading.facts(compiled, by_line=job in BY_LINE)


def main() -> None:
    check = asked(__doc__)
    found = stored.read() if stored.FILE.exists() else {}
    listed = jobs()
    if check:
        for job in listed[:check]:
            same = made(job) == found[stored.key(job)]
            print(f"{stored.key(job)}: {'the same' if same else 'DIFFERENT'}")
        return
    for job in listed:
        key = stored.key(job)
        if key not in found:
            found[key] = made(job)
            print(key, found[key].get("refused", ""), flush=True)
            stored.write(found, version("triton"))


if __name__ == "__main__":
    main()
