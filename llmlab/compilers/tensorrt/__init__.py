"""TensorRT's ideas on a CPU: a network is built into an engine.

    calibration   histograms → ranges: max, percentile, entropy, mse; int8 and fp8
    network       a captured program with named weights; profiles; plugins
    placement     where Q and DQ stand, and how far they move
    layers        which operations become one layer
    tactics       several ways to compute a layer, timed; the timing cache
    engine        build, call, refit, save, load

Start with `placement`. What TensorRT-LLM makes of the same ideas is in
`llmlab.inference.engine`.
"""

from pathlib import Path

from llmlab.compilers.tensorrt.calibration import (
    CALIBRATORS,
    FORMATS,
    Format,
    Histogram,
    absolute_max,
    by_entropy,
    by_max,
    by_mse,
    by_percentile,
    counted,
    divergence,
    entropy_two_sided,
    format_of,
    histogram,
    scale_of,
)
from llmlab.compilers.tensorrt.engine import (
    Engine,
    Plan,
    build,
    load_engine,
    summary,
)
from llmlab.compilers.tensorrt.layers import (
    Layer,
    Split,
    fuse_layers,
    operands_format,
    split,
    traffic,
)
from llmlab.compilers.tensorrt.network import (
    Network,
    Profile,
    bound,
    define,
    plugin,
    register_plugin,
)
from llmlab.compilers.tensorrt.placement import (
    carried,
    moves_through,
    observe,
    quantise,
    quantised_values,
    stored_bytes,
    stored_format,
)
from llmlab.compilers.tensorrt.tactics import (
    Tactic,
    TimingCache,
    machine,
    pick,
    prepare,
    run_layer,
    tactics_for,
    timing_key,
)

RUNS_FILE = Path(__file__).parent.parent / "data" / "tensorrt.csv"

__all__ = [
    "CALIBRATORS",
    "FORMATS",
    "RUNS_FILE",
    "Engine",
    "Format",
    "Histogram",
    "Layer",
    "Network",
    "Plan",
    "Profile",
    "Split",
    "Tactic",
    "TimingCache",
    "absolute_max",
    "bound",
    "build",
    "by_entropy",
    "by_max",
    "by_mse",
    "by_percentile",
    "carried",
    "counted",
    "define",
    "divergence",
    "entropy_two_sided",
    "format_of",
    "fuse_layers",
    "histogram",
    "load_engine",
    "machine",
    "moves_through",
    "observe",
    "operands_format",
    "pick",
    "plugin",
    "prepare",
    "quantise",
    "quantised_values",
    "register_plugin",
    "run_layer",
    "scale_of",
    "split",
    "stored_bytes",
    "stored_format",
    "summary",
    "tactics_for",
    "timing_key",
    "traffic",
]
