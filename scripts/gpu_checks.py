"""What `scripts/gpu_check.py` runs: one function per check, `check(device)`.

A function returns plain data for the report. `expect` says what must hold; where it
does not, the check has failed. On "cpu" sizes are small, and what a GPU alone can show
is left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("float32", "float16", "bfloat16")
# of results around 1, against fp32: a few units in the last place
TOLERANCE = {"float32": 2e-4, "float16": 1e-2, "bfloat16": 6e-2}


class Skipped(RuntimeError):
    """There is a reason why this check cannot run here."""


@dataclass(frozen=True)
class Check:
    """A check, and what it needs.

    Attributes:
        asks: what it is about, in a line.
        needs: packages.
        cpu: whether it has a form for a CPU.
        interprets: whether Triton interprets there, or compiles.
        limit: seconds.
    """

    name: str
    asks: str
    run: Callable[[str], dict]
    needs: tuple[str, ...]
    cpu: bool
    interprets: bool
    limit: float


CHECKS: dict[str, Check] = {}


def check(*needs: str, cpu: bool = True, interprets: bool = False, limit: float = 45.0):
    """Makes a function one of the checks; its docstring says what it asks."""

    def register(run: Callable[[str], dict]) -> Callable[[str], dict]:
        asks = run.__doc__.strip().splitlines()[0]
        made = Check(run.__name__, asks, run, needs, cpu, interprets, limit)
        CHECKS[made.name] = made
        return run

    return register


def expect(holds: bool, what: str) -> None:
    """
    Raises:
        AssertionError: it does not hold.
    """
    if not holds:
        raise AssertionError(what)


def off(ours, right) -> float:
    """The largest difference, relative to the largest number that should be there."""
    scale = max(1.0, right.float().abs().max().item())
    return (ours.float() - right.float()).abs().max().item() / scale


def near(found: dict[str, float], limit: float) -> dict[str, float]:
    """All differences, and none above the limit."""
    for name, value in found.items():
        expect(value <= limit, f"{name} is off by {value:.2g}, more than {limit:g}")
    return {name: float(f"{value:.2g}") for name, value in found.items()}


def milliseconds(call: Callable[[], object], device: str) -> float:
    """The least of several runs."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=10, rep=50, return_mode="min")
    from llmlab.models.machine import seconds

    return 1e3 * min(seconds(call) for _ in range(3))


# the device ---------------------------------------------------------------------------


@check()
def device(device: str) -> dict:
    """Which device it is, and how fast it multiplies and copies."""
    import torch

    found: dict = {"name": "cpu", "threads": torch.get_num_threads()}
    n, large = 256, 1 << 22
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
        n, large = 8192, 1 << 29
    for dtype in DTYPES[: 3 if device == "cuda" else 1]:
        a, b = (
            torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in "ab"
        )
        took = milliseconds(lambda a=a, b=b: a @ b, device)
        found[f"TFLOP/s {dtype}"] = round(2 * n**3 / took / 1e9, 3)
    x = torch.empty(large, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    took = milliseconds(lambda: y.copy_(x), device)
    found["GB/s"] = round(2 * large / took / 1e6, 1)
    return found


# Triton -------------------------------------------------------------------------------


def attention_reference(q, k, v, causal: bool):
    """In fp32, the last query at the last key."""
    from llmlab.inference.flash_attention import standard_attention

    mask = None if causal else q.new_ones(q.shape[2], k.shape[2]).bool()
    return standard_attention(q.float(), k.float(), v.float(), mask)


def attention_cases(device: str, kind):
    """(q, k, v) of this dtype."""
    import torch

    sizes = ((2, 6, 3, 29, 29, 16), (1, 4, 2, 5, 37, 64), (2, 6, 2, 1, 50, 24))
    for B, H, K, T, S, D in sizes:
        yield tuple(
            torch.randn(B, h, n, D, device=device).to(kind)
            for h, n in ((H, T), (K, S), (K, S))
        )


@check("triton", interprets=True)
def triton_kernels(device: str) -> dict:
    """08/06: softmax, mlp and attention against torch, in fp32, fp16 and bf16."""
    import torch

    from llmlab.compilers import program
    from llmlab.compilers.triton_kernels import launching

    found = {}
    for dtype in DTYPES:
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        errors = {}
        x = (torch.randn(37, 140, device=device) * 9)[:, 3:133].to(kind)
        errors["softmax"] = off(launching.softmax(x), x.float().softmax(-1))
        sizes = ((37, 50, 70), (257, 144, 200)) if device == "cuda" else ((37, 50, 70),)
        for T, d, f in sizes:
            made = program.example_inputs("mlp", 0, T, d, f)
            x, w, b = (each.to(device, kind) for each in made)
            right = program.mlp(x.float(), w.float(), b.float())
            errors[f"mlp {T}x{d}x{f}"] = off(launching.mlp(x, w, b), right)
        for q, k, v in attention_cases(device, kind):
            for causal in (True, False):
                ours = launching.attention(q, k, v, causal)
                right = attention_reference(q, k, v, causal)
                name = f"attention {q.shape[2]}, {k.shape[2]} {causal}"
                errors[name] = off(ours, right)
        found[dtype] = near(errors, TOLERANCE[dtype])
    return found


@check("triton", interprets=True)
def flash_attention(device: str) -> dict:
    """07/02: the FlashAttention kernel against torch, in fp32, fp16 and bf16."""
    import torch

    from llmlab.inference.flash_attention import triton_kernel

    found = {}
    for dtype in DTYPES:
        torch.manual_seed(0)
        errors = {}
        for q, k, v in attention_cases(device, getattr(torch, dtype)):
            ours = triton_kernel.forward(q, k, v, True, 16, 32)[0]
            name = f"{q.shape[2]}, {k.shape[2]}"
            errors[name] = off(ours, attention_reference(q, k, v, True))
        found[dtype] = near(errors, TOLERANCE[dtype])
    return found


def family(instruction: str) -> str:
    """mma.sync, wgmma, tcgen05 or v_mfma."""
    names = ("mma.sync", "wgmma", "tcgen05", "v_mfma")
    return next((name for name in names if instruction.startswith(name)), instruction)


@check("triton", limit=60.0)
def triton_table(device: str) -> dict:
    """08/06: the device's own PTX uses the products that the page's table says."""
    import torch

    from llmlab.compilers.triton_kernels import Job, compile_jobs, reading, stored

    if device == "cpu":
        job = Job("one_dot", "sm_90")
        facts = reading.facts(compile_jobs([job], sass=True)[0])
        expect(facts == stored.of(job), "compiled now, one_dot is not as stored")
        return {job.target: facts["products"], "sass": facts["sass"]}
    from llmlab.compilers.triton_kernels import kernels, launching

    major, minor = torch.cuda.get_device_capability()
    target = f"sm_{major}{minor}"
    tile = launching.Tile(128, 128, 64, 8)
    x, w = torch.randn(512, 256), torch.randn(256, 512)
    x, w, b = (each.half().cuda() for each in (x, w, torch.randn(512)))
    y = x.new_empty(512, 512)
    handle = kernels.mlp_tile[launching.mlp_grid(x, w, tile)](
        *launching.mlp_arguments(x, w, b, y, tile), num_warps=8, num_stages=3
    )
    words = [word.name for word in reading.instructions(handle.asm["ptx"])]
    products = sorted({family(w) for w in words if reading.PRODUCT.match(w)})
    found = {
        "target": target,
        "products": products,
        "registers": handle.n_regs,
        "spilled": handle.n_spills,
        "shared": handle.metadata.shared,
        "sass": reading.machine_words(handle.asm["sass"]),  # disassembled when asked
    }
    known = {f"sm_{c}" for c in (80, 90, 100)}
    if target in known:
        facts = stored.of(Job("mlp_tile", target, warps=8))
        wanted = sorted({family(name) for name in facts["products"]})
        expect(products == wanted, f"{target} has {products}, the table {wanted}")
        found["as stored"] = {
            name: [found[name], facts[name]] for name in ("registers", "shared")
        }
    else:
        found["note"] = f"the table has no row for {target}"
    return found


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, without ties."""
    n = len(a)
    ranks = [{v: i for i, v in enumerate(sorted(values))} for values in (a, b)]
    d = sum((ranks[0][x] - ranks[1][y]) ** 2 for x, y in zip(a, b, strict=True))
    return 1 - 6 * d / (n * (n * n - 1)) if n > 1 else 1.0


@check("triton", interprets=True, limit=90.0)
def triton_autotune(device: str) -> dict:
    """08/06: the search for a tile, its log, the model's ranks, and torch's time."""
    import torch
    import triton

    from llmlab.compilers import program
    from llmlab.compilers.triton_kernels import kernels, stored, tuning

    cuda = device == "cuda"
    target, gpu = "sm_80", tuning.A100
    if cuda and torch.cuda.get_device_capability()[0] >= 9:
        target, gpu = "sm_90", tuning.H100
    n = 4096 if cuda else 48
    problem = tuning.Problem(4096, 4096, 4096)
    candidates = [
        c for c in stored.candidates(target) if not tuning.refusal(c, gpu, problem)
    ]
    names = ("ROWS", "COLS", "DEPTH", "GROUP")
    configs = [
        triton.Config(
            {name: c["constants"][name] for name in names},
            num_warps=c["warps"],
            num_stages=c["stages"],
        )
        for c in (candidates if cuda else candidates[:2])
    ]
    bench = {} if cuda else {"do_bench": lambda call, quantiles: [1.0, 1.0, 1.0]}
    tuned = triton.autotune(configs, key=["T", "f", "d"], **bench)(kernels.mlp_tile)
    kind = torch.float16 if cuda else torch.float32
    made = program.example_inputs("mlp", 0, n, n, n)
    x, w, b = (each.to(device, kind) for each in made)
    w = w / n**0.5
    y = x.new_empty(n, n)

    def grid(sizes):
        return (triton.cdiv(n, sizes["ROWS"]) * triton.cdiv(n, sizes["COLS"]),)

    def ours():
        return tuned[grid](x, w, b, y, n, n, n, WIDE=not cuda)

    ours()
    right = program.mlp(x.float(), w.float(), b.float())
    errors = near({"mlp": off(y, right)}, TOLERANCE["float16"])
    timings = [(str(c), t) for c, t in tuned.configs_timings.items()]
    found = {"off": errors, "best": str(tuned.best_config), "log": timings}
    if cuda:
        took = [each[1][0] for each in timings]
        model = [tuning.seconds(c, gpu, problem) for c in candidates]
        found["rank correlation with the model"] = rank_correlation(took, model)
        flops = 2 * n**3 / 1e9
        for name, call in (
            ("ours", ours),
            ("torch, eager", lambda: program.mlp(x, w, b)),
            ("torch, product alone", lambda: x @ w),
        ):
            found[f"TFLOP/s {name}"] = round(flops / milliseconds(call, device), 1)
    return found


@check("triton", cpu=False)
def attention_times(device: str) -> dict:
    """Attention of 4,096 tokens in bf16: both kernels and PyTorch's, in ms."""
    import torch
    import torch.nn.functional as F

    from llmlab.compilers.triton_kernels import launching
    from llmlab.inference.flash_attention import triton_kernel

    q = torch.randn(1, 32, 4096, 128, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, 4096, 128, device=device).to(q.dtype) for _ in "kv")
    sdpa = F.scaled_dot_product_attention
    right = sdpa(q, k, v, is_causal=True, enable_gqa=True)
    ours = launching.attention(q, k, v, rows=64, cols=64)
    flash = triton_kernel.forward(q, k, v, True, 64, 64)[0]
    errors = near({"08/06": off(ours, right), "07/02": off(flash, right)}, 6e-2)
    calls = {
        "08/06": lambda: launching.attention(q, k, v, rows=64, cols=64),
        "07/02": lambda: triton_kernel.forward(q, k, v, True, 64, 64),
        "PyTorch": lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True),
    }
    times = {name: milliseconds(call, device) for name, call in calls.items()}
    return {"off": errors, "ms": times}


# models -------------------------------------------------------------------------------


@check()
def models(device: str) -> dict:
    """Our Llama on the device: logits, greedy tokens, bf16; also the real model."""
    import copy

    import torch

    from llmlab.models import course_model, real_model
    from llmlab.models.generation import generate

    torch.backends.cuda.matmul.allow_tf32 = False
    every = {"course": course_model.load()}
    if device == "cuda" and real_model.is_fetched():
        every["real"] = real_model.load()
    found = {}
    for name, model in every.items():
        torch.manual_seed(0)
        vocab = model.config.vocab_size
        ids = torch.randint(0, vocab, (2, 48))
        with torch.no_grad():
            right = copy.deepcopy(model).double()(ids)
            there = copy.deepcopy(model).to(device)
            logits = there(ids.to(device)).cpu()
            half = copy.deepcopy(model).to(device, torch.bfloat16)
            low = half(ids.to(device)).cpu().float()
        near({"logits": off(logits, right)}, 1e-3)
        same = (low.argmax(-1) == right.argmax(-1)).float().mean().item()
        expect(
            same > 0.9, f"bf16 chooses another token at {1 - same:.0%} of the places"
        )
        greedy = generate(there, ids[:1].to(device), 24).cpu()
        wanted = generate(model, ids[:1], 24)
        agree = (greedy == wanted).float().mean().item()
        expect(agree > 0.9, f"{name}: greedy tokens agree at {agree:.0%}")
        found[name] = {
            "logits off": off(logits, right),
            "bf16: same token": round(same, 3),
            "bf16: logits off": off(low, right),
            "greedy tokens alike": round(agree, 3),
        }
    return found


@check()
def engine(device: str) -> dict:
    """07/08: requests through the engine, and each one alone, write the same tokens."""
    import torch

    from llmlab.inference.engine import Engine, EngineConfig, SamplingParams
    from llmlab.models import course_model
    from llmlab.models.generation import generate

    model = course_model.load().to(device)
    random = torch.Generator().manual_seed(0)
    lengths = (5, 19, 33, 8)
    vocab = model.config.vocab_size
    prompts = [torch.randint(0, vocab, (n,), generator=random) for n in lengths]
    wanted = [
        generate(model, p[None].to(device), 12)[0, len(p) :].tolist() for p in prompts
    ]
    # what the engine makes on its way (tables, places) is made on this device
    with torch.device(device), torch.no_grad():
        made = Engine(model, EngineConfig(num_blocks=64, block_size=8))
        numbers = [
            made.add(p.tolist(), SamplingParams(max_new_tokens=12)) for p in prompts
        ]
        written: dict[int, list[int]] = {number: [] for number in numbers}
        while not made.idle:
            for event in made.step():
                if event.token is not None:
                    written[event.id].append(event.token)
    same = [written[n] == w for n, w in zip(numbers, wanted, strict=True)]
    expect(all(same), f"the same tokens as alone, by request: {same}")
    return {"requests": len(prompts), "steps": made.stats.steps}


@check()
def lora(device: str) -> dict:
    """04/05: five steps of LoRA on the device and on the CPU have the same losses."""
    import torch

    from llmlab.models import course_model
    from llmlab.models.language_model import next_token_loss
    from llmlab.peft import lora as method

    text = course_model.tokens("train")[: 4 * 65].view(4, 65)

    def losses(where: str) -> list[float]:
        torch.manual_seed(0)
        model = course_model.load()
        method.apply(model, method.LoRAConfig(r=4))
        model.to(where)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        found = []
        for _ in range(5):
            loss = next_token_loss(model(text.to(where)), text.to(where))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    ours, right = losses(device), losses("cpu")
    worst = max(abs(a - b) for a, b in zip(ours, right, strict=True))
    expect(worst < 5e-3, f"losses differ by {worst:.2g}")
    expect(ours[-1] < ours[0], "the loss does not fall")
    return {"losses": [round(x, 4) for x in ours], "off": worst}


@check("bitsandbytes", "transformers", "peft", limit=60.0)
def qlora(device: str) -> dict:
    """04/07: NF4 as bitsandbytes has it, and steps of its QLoRA through peft."""
    import bitsandbytes
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from llmlab.models import checkpoint, course_model
    from llmlab.peft.qlora import nf4

    torch.manual_seed(0)
    w = torch.randn(96, 128)
    theirs, state = bitsandbytes.functional.quantize_4bit(
        w.to(device), quant_type="nf4", blocksize=64
    )
    back = bitsandbytes.functional.dequantize_4bit(theirs, state).cpu()
    ours = nf4.dequantize(nf4.quantize(w, double=False)).float()
    near({"nf4": off(back, ours)}, 1e-3)
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(course_model.load(), folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=device == "cuda",
                bnb_4bit_compute_dtype=compute,
            ),
            device_map={"": 0 if device == "cuda" else "cpu"},
        )
    model = peft.prepare_model_for_kbit_training(model)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, settings).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = bitsandbytes.optim.PagedAdamW32bit if device == "cuda" else torch.optim.AdamW
    optimizer = kind(trained, lr=1e-2)
    text = course_model.tokens("train")[: 4 * 65].view(4, 65).to(device)
    losses = []
    for _ in range(5 if device == "cuda" else 2):
        loss = model(input_ids=text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expect(losses[-1] < losses[0], f"the loss does not fall: {losses}")
    return {"losses": [round(x, 4) for x in losses], "nf4 off": off(back, ours)}


@check("transformers", limit=60.0)
def formats(device: str) -> dict:
    """06: folders of compressed models, opened by transformers, give our logits."""
    from importlib.util import find_spec

    import torch
    from transformers import AutoModelForCausalLM

    from llmlab.compression import formats as ours
    from llmlab.compression.recipes import Recipe, compress
    from llmlab.models import course_model

    found: dict = {}
    libraries = {"compressed-tensors": "compressed_tensors", "gptq": "gptqmodel"}
    libraries["gguf"] = "gguf"
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
    for format, library in libraries.items():
        model, opened_by = course_model.load(), {}
        with tempfile.TemporaryDirectory() as folder:
            if format == "gguf" and find_spec(library):
                ours.save_gguf(model, Path(folder) / "model.gguf", "F16", None, "F16")
                opened_by = {"gguf_file": "model.gguf", "dtype": torch.float32}
            elif format != "gguf":
                model = compress(model, Recipe("rtn", bits=4, group=32))
                ours.save(model, folder, format)
            if find_spec(library) is None:
                found[format] = f"skipped: {library} is not installed"
                continue
            theirs = AutoModelForCausalLM.from_pretrained(folder, **opened_by)
            with torch.no_grad():
                right = model(ids)
                got = theirs.to(device)(ids.to(device)).logits.cpu()
        found[format] = near({"logits": off(got, right)}, 3e-2)
    if all(isinstance(each, str) for each in found.values()):
        raise Skipped("; ".join(f"{k} {v}" for k, v in found.items()))
    return found


# what it takes ------------------------------------------------------------------------


@check()
def memory(device: str) -> dict:
    """What training and a cache take, counted, and by the course's accounting."""
    import torch

    from llmlab.models import accounting
    from llmlab.models.cache import KVCache
    from llmlab.models.llama import Llama, LlamaConfig

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )

    def taken() -> int:
        return torch.cuda.memory_allocated() if device == "cuda" else 0

    before = taken()
    model = Llama(config).to(device)
    weights = sum(p.nbytes for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters())
    ids = torch.randint(0, 512, (2, 32), device=device)
    model(ids).float().logsumexp(-1).mean().backward()
    optimizer.step()
    states = sum(
        x.nbytes
        for state in optimizer.state.values()
        for x in state.values()
        if torch.is_tensor(x) and x.ndim
    )
    gradients = sum(p.grad.nbytes for p in model.parameters())
    counted = weights + gradients + states
    planned = accounting.weight_bytes(config, torch.float32)
    expect(weights == planned, f"weights take {weights} bytes, planned {planned}")
    expect(counted == 4 * planned, f"{counted} bytes, planned {4 * planned}")
    found = {"weights": weights, "gradients": gradients, "Adam": states}
    if device == "cuda":
        allocated = taken() - before
        found["allocated"] = allocated
        # the allocator gives 512 bytes at least, and a step leaves little behind
        expect(
            counted <= allocated <= 1.15 * counted,
            f"{allocated} bytes are allocated, {counted} planned",
        )
    cache = KVCache(config.num_hidden_layers)
    with torch.no_grad():
        model(ids, cache=cache)
    planned = accounting.kv_cache_bytes(config, 2, 32, torch.float32)
    expect(cache.nbytes == planned, f"the cache takes {cache.nbytes}, not {planned}")
    return {**found, "cache": cache.nbytes}


@check()
def world_of_one(device: str) -> dict:
    """05: NCCL (gloo on a CPU) with one rank: collectives, and a step of DDP."""
    import os

    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    backend = "nccl" if device == "cuda" else "gloo"
    if backend == "gloo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
        try:
            x = torch.arange(1000.0, device=device)
            y = x.clone()
            dist.all_reduce(y)
            gathered = [torch.empty_like(x)]
            dist.all_gather(gathered, x)
            expect(torch.equal(x, y), "all_reduce of one rank changes the numbers")
            expect(torch.equal(x, gathered[0]), "all_gather does")
            torch.manual_seed(0)
            layer = torch.nn.Linear(8, 4).to(device)
            plain = torch.nn.Linear(8, 4).to(device)
            plain.load_state_dict(layer.state_dict())
            wrapped = DistributedDataParallel(layer)
            for each in (wrapped, plain):
                each(x.view(125, 8)).square().mean().backward()
            near({"gradient": off(layer.weight.grad, plain.weight.grad)}, 1e-5)
        finally:
            dist.destroy_process_group()
    found = {"backend": backend}
    if device == "cuda":
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


@check(limit=75.0)
def torch_compile(device: str) -> dict:
    """08: the part's mlp and a Llama under torch.compile equal what is not compiled."""
    import torch

    from llmlab.compilers import program
    from llmlab.models import course_model

    # without a GPU only the front end: the rest wants a C++ compiler, and a minute
    backend = "inductor" if device == "cuda" else "eager"
    x, w, b = (t.to(device) for t in program.example_inputs("mlp"))
    compiled = torch.compile(program.mlp, backend=backend)
    errors = {"mlp": off(compiled(x, w, b), program.mlp(x, w, b))}
    found: dict = {"backend": backend}
    if device == "cuda":
        model = course_model.load().to(device).eval()
        ids = torch.randint(0, 256, (2, 64), device=device)
        with torch.no_grad():
            right = model(ids)
            faster = torch.compile(model)
            errors["llama"] = off(faster(ids), right)
            for name, each in (("eager", model), ("compiled", faster)):
                found[f"ms {name}"] = milliseconds(lambda f=each: f(ids), device)
    return {**found, "off": near(errors, 2e-3)}


@check()
def narrow_products(device: str) -> dict:
    """06: products of int8, and of fp8 where the chip has them, against exact ones."""
    import torch

    from llmlab.models import codes

    torch.manual_seed(0)
    a = torch.randint(-127, 128, (64, 128), dtype=torch.int8, device=device)
    b = torch.randint(-127, 128, (32, 128), dtype=torch.int8, device=device)
    exact = a.cpu().long() @ b.cpu().long().T
    found = {}
    made = codes.product(a, b.T).cpu().long()
    expect(torch.equal(made, exact), "the product of int8 is not exact")
    found["int8"] = "exact"
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        x, y = (torch.randn(64, 128, device=device) for _ in "xy")
        one = torch.ones((), device=device)
        low_x, low_y = (z.to(torch.float8_e4m3fn) for z in (x, y))
        made = torch._scaled_mm(low_x, low_y.T, one, one, out_dtype=torch.bfloat16)
        right = low_x.float() @ low_y.float().T
        found["fp8"] = near({"e4m3": off(made, right)}, 1e-2)
    return found


# what a GPU's processors make of it ---------------------------------------------------


@check("numba", limit=60.0)
def recorded_kernels(device: str) -> dict:
    """09/02: the lesson's CUDA kernels, on a CPU simulated, against NumPy."""
    import numpy as np

    from llmlab.chips import nvidia_gpu as nv

    if device == "cuda":
        from numba import cuda

        if not cuda.is_available():
            raise Skipped("numba finds no GPU, or no CUDA toolkit to compile with")
    else:
        nv.cuda_simulator()
    from llmlab.chips.nvidia_gpu import kernels

    def run(kernel, grid, block, *arguments) -> None:
        if device == "cuda":
            cuda.jit(kernel)[grid, block](*arguments)
        else:
            nv.record(kernel, grid, block, *arguments)

    random = np.random.default_rng(0)
    M, K, N = (513, 129, 200) if device == "cuda" else (9, 7, 11)
    a, b = random.random((M, K), np.float32), random.random((K, N), np.float32)
    n = 100_000 if device == "cuda" else 100
    x = random.random(n, np.float32)
    wide, deep = -(-K // 32), -(-M // 32)
    keys = random.random((40, 2, 24), np.float32)
    q = random.random((6, 24), np.float32)
    scores = np.einsum("hd,thd->ht", q, keys.repeat(3, axis=1))
    total = np.add.reduceat(x, np.arange(0, n, 64))
    square = random.random((32, 32), np.float32)
    tall = (wide, -(-M // 8))
    # name → kernel, grid, block, arguments before and after the result, the result
    cases = {
        "add": (kernels.vector_add, -(-n // 64), 64, (x, x), (), 2 * x),
        "transpose": (kernels.transpose_naive, tall, (32, 8), (a,), (), a.T),
        "sum": (kernels.block_sum(64), -(-n // 64), 64, (x,), (), total),
        "sum, interleaved": (
            kernels.block_sum(64, True),
            -(-n // 64),
            64,
            (x,),
            (),
            total,
        ),
        "product": (
            kernels.matmul_tiled(8),
            (-(-N // 8), -(-M // 8)),
            (8, 8),
            (a, b),
            (),
            a @ b,
        ),
        "gram": (kernels.gram_tiled(1), 1, (32, 32), (square,), (), square @ square.T),
        "scores": (kernels.scores_by_thread, (2, 6), 32, (q, keys), (3,), scores),
        "scores, by warp": (
            kernels.scores_by_warp(8),
            (40, 6),
            8,
            (q, keys),
            (3,),
            scores,
        ),
    }
    for name, kind in (("tile", {}), ("padded", {"pad": 1}), ("xor", {"swizzled": 1})):
        kernel = kernels.transpose_tiled(**kind)
        cases[f"transpose, {name}"] = (kernel, (wide, deep), (32, 8), (a,), (), a.T)
    errors = {}
    for name, (kernel, grid, block, before, after, right) in cases.items():
        out = np.zeros(right.shape, np.float32)
        run(kernel, grid, block, *before, out, *after)
        scale = max(1.0, float(np.abs(right).max()))
        errors[name] = float(np.abs(out - right).max()) / scale
    return near(errors, 1e-4)


@check()
def strides(device: str) -> dict:
    """09/02: time to read one number in so many, beside the sectors of a warp."""
    import numpy as np
    import torch

    from llmlab.chips import nvidia_gpu as nv

    n = 1 << (22 if device == "cuda" else 16)
    x, y = torch.ones(32 * n, device=device), torch.empty(n, device=device)
    found: dict = {}
    for stride in (1, 2, 4, 8, 16, 32):
        took = milliseconds(lambda s=stride: y.copy_(x[: n * s : s]), device)
        sectors = nv.global_memory(4 * stride * np.arange(32)).sectors
        found[str(stride)] = {
            "sectors": sectors,
            "ms": round(took, 4),
            "GB/s used": round(4 * n / took / 1e6, 1),
            "GB/s moved": round(32 * sectors * n / 32 / took / 1e6, 1),
        }
    if device == "cuda":
        slower = found["32"]["ms"] / found["1"]["ms"]
        expect(slower > 2, f"stride 32 takes only {slower:.1f} times as long as 1")
    return found


@check("triton")
def occupancy(device: str) -> dict:
    """09/02: blocks that a processor holds, by our rules and by NVIDIA's driver."""
    import ctypes

    import torch

    from llmlab.chips import nvidia_gpu as nv

    if device == "cpu":
        held = nv.occupancy(320, 37, 0, nv.limits("7.0")).blocks
        expect(held == 4, f"NVIDIA prints 4 blocks, we say {held}")
        return {"320 threads, 37 registers": held}
    from llmlab.compilers.triton_kernels import kernels, launching

    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    if capability not in nv.capabilities():
        raise Skipped(f"the table has no compute capability {capability}")
    sm = nv.limits(capability)
    room = properties.max_threads_per_multi_processor // 32
    expect(room == sm.warps, f"{room} warps per SM, the table says {sm.warps}")
    driver = ctypes.CDLL("libcuda.so.1")
    found: dict = {"capability": capability}
    for warps, depth in ((4, 32), (8, 64)):
        tile = launching.Tile(128, 128, depth, 8)
        x, w = (torch.randn(256, 256).half().cuda() for _ in "xw")
        b, y = x.new_zeros(256), x.new_empty(256, 256)
        handle = kernels.mlp_tile[launching.mlp_grid(x, w, tile)](
            *launching.mlp_arguments(x, w, b, y, tile), num_warps=warps, num_stages=2
        )
        shared = handle.metadata.shared
        count = ctypes.c_int()
        status = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            ctypes.byref(count),
            ctypes.c_void_p(handle.function),
            32 * warps,
            ctypes.c_size_t(shared),
        )
        expect(status == 0, f"the driver's occupancy ends with {status}")
        ours = nv.occupancy(32 * warps, handle.n_regs, shared, sm)
        what = f"{32 * warps} threads, {handle.n_regs} registers, {shared} bytes"
        expect(
            ours.blocks == count.value,
            f"{what}: {ours.blocks} blocks by our rules, {count.value} by the driver",
        )
        found[what] = {"blocks": ours.blocks, "limit": ours.limit}
    return found
