"""LLVM itself, which llvmlite brings along: from its text to better text, or to code.

    binding      llvmlite's binding, ready for every target
    optimised    a text after LLVM's passes for a machine, which need not be here
    loaded       a text as machine code that can be called

No C compiler is needed. `llvmlite` is imported when it is first used.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llvmlite.binding import ExecutionEngine, ModuleRef, TargetMachine


@cache
def binding() -> Any:
    """llvmlite's binding, ready for every target that LLVM was built with.

    Raises:
        ImportError: llvmlite is not installed.
    """
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    return binding


def optimised(
    text: str, machine: TargetMachine, level: int = 3, **tuning: bool
) -> ModuleRef:
    """LLVM's text, checked, and after its passes for a machine.

    Args:
        level: of LLVM's passes; at 0 there are none.
        tuning: what is not LLVM's default, of llvmlite's PipelineTuningOptions.
    Raises:
        ValueError: LLVM cannot read it; its own words say where.
    """
    llvm = binding()
    try:
        module = llvm.parse_assembly(text)
        module.triple = machine.triple
        module.data_layout = str(machine.target_data)
        module.verify()
    except RuntimeError as problem:
        raise ValueError(f"LLVM cannot read this: {problem}") from None
    if level > 0:
        options = llvm.create_pipeline_tuning_options(speed_level=level)
        for name, wanted in tuning.items():
            setattr(options, name, wanted)
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
    return module


def loaded(text: str, level: int = 3, **tuning: bool) -> ExecutionEngine:
    """Machine code for the CPU that this runs on; it lives as long as what is returned.

    Args:
        level, tuning: see `optimised`.
    """
    llvm = binding()
    here = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=level,
        jit=True,
    )
    module = optimised(text, here, level, **tuning)
    engine = llvm.create_mcjit_compiler(module, here)
    engine.finalize_object()
    return engine
