"""What SCALE-Sim says of products on systolic arrays, kept for the tests and the page.

    python3 -m venv V
    V/bin/pip install scalesim==3.0.0 "numpy<2.4"
    V/bin/python scripts/golden/tpu_goldens.py llmlab/chips/data/tpu_scale_sim.json

SCALE-Sim 3.0.0 does not run with numpy 2.4. Beside the reports' figures, each case has
a digest of the demands: for each cycle and port the place in the matrix that is asked
for, −1 where a port is idle, as 32-bit numbers. For "os" the demands for results are
left out: they leave before they are done (see the lesson).

`--serve` runs one product for each line that it gets, and answers with its seconds:
`benchmarks/beside_scalesim.py` asks so.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

CONFIG = """[general]
run_name = lesson
[architecture_presets]
ArrayHeight: {rows}
ArrayWidth: {columns}
IfmapSramSzkB: 64
FilterSramSzkB: 64
OfmapSramSzkB: 64
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Dataflow: {flow}
Bandwidth: 10
MemoryBanks: 1
ReadRequestBuffer: 32
WriteRequestBuffer: 32
[layout]
IfmapCustomLayout: False
IfmapSRAMBankBandwidth: 10
IfmapSRAMBankNum: 10
IfmapSRAMBankPort: 2
FilterCustomLayout: False
FilterSRAMBankBandwidth: 10
FilterSRAMBankNum: 10
FilterSRAMBankPort: 2
[sparsity]
SparsitySupport: false
SparseRep: ellpack_block
OptimizedMapping: false
BlockSize: 8
RandomNumberGeneratorSeed: 40
[run_presets]
InterfaceBandwidth: CALC
UseRamulatorTrace: False
"""
# rows, columns, m, k, n: both sides even and not, smaller and larger than the array
SHAPES = [
    (16, 16, 128, 128, 128),
    (32, 32, 64, 64, 64),
    (4, 3, 5, 6, 7),
    (3, 5, 11, 4, 9),
    (8, 4, 1, 20, 13),
    (2, 2, 2, 3, 2),
    (1, 6, 4, 5, 7),
    (6, 1, 4, 7, 3),
    (5, 7, 3, 2, 4),
    (7, 5, 30, 7, 5),
    (8, 8, 17, 33, 9),
    (12, 10, 10, 12, 25),
    (16, 8, 24, 40, 24),
    (4, 16, 33, 8, 70),
]


def layer(folder, flow, rows, columns, m, k, n):
    """A layer of SCALE-Sim, ready to run."""
    from scalesim.layout_utils import layouts
    from scalesim.scale_config import scale_config
    from scalesim.single_layer_sim import single_layer_sim
    from scalesim.topology_utils import topologies

    folder = Path(folder)
    text = CONFIG.format(rows=rows, columns=columns, flow=flow)
    (folder / "hw.cfg").write_text(text)
    (folder / "topology.csv").write_text(
        f"Layer, M, N, K, Sparsity,\nproduct, {m}, {n}, {k},\n"
    )
    # A line of the layout has the name and twenty numbers; none of them is used here.
    names = ", ".join(f"column {i}" for i in range(20))
    numbers = ", ".join("1" for _ in range(20))
    (folder / "layout.csv").write_text(f"Layer, {names},\nproduct, {numbers},\n")
    config = scale_config()
    config.read_conf_file(str(folder / "hw.cfg"))
    topology = topologies()
    topology.load_arrays(str(folder / "topology.csv"), mnk_inputs=True)
    layout = layouts()
    layout.load_arrays(str(folder / "layout.csv"), mnk_inputs=True)
    made = single_layer_sim()
    made.set_params(
        layer_id=0,
        config_obj=config,
        topology_obj=topology,
        layout_obj=layout,
        verbose=False,
    )
    return made


def places(demand, addresses):
    """Demands as places in the matrix whose addresses these are."""
    demand = np.asarray(demand)
    place = {int(address): i for i, address in enumerate(addresses.ravel())}
    place[-1] = -1
    flat = [place[int(each)] for each in demand.ravel()]
    return np.array(flat, dtype="<i4").reshape(demand.shape)


def digest(demand):
    """A short name of a table of numbers, and of its shape."""
    text = str(demand.shape).encode() + demand.astype("<i4").tobytes()
    return hashlib.sha256(text).hexdigest()[:16]


def case(folder, flow, rows, columns, m, k, n):
    """What SCALE-Sim reports."""
    made = layer(folder, flow, rows, columns, m, k, n)
    made.run()
    made.calc_report_data()
    x, w, y = made.compute_system.get_demand_matrices()
    operands = made.op_mat_obj
    row = {
        "flow": flow,
        "array": [rows, columns],
        "shape": [m, k, n],
        "cycles": int(made.total_cycles),
        "stalls": int(made.stall_cycles),
        "utilisation": round(float(made.overall_util), 9),
        "mapping": round(float(made.mapping_eff), 9),
        "compute": round(float(made.compute_util), 9),
        "reads_x": int(made.ifmap_sram_reads),
        "reads_w": int(made.filter_sram_reads),
        "writes_y": int(made.ofmap_sram_writes),
        "x": digest(places(x, operands.get_ifmap_matrix()[1])),
        "w": digest(places(w, operands.get_filter_matrix()[1])),
    }
    if flow != "os":
        row["y"] = digest(places(y, operands.get_ofmap_matrix()[1]))
    return row


def serve(flow, rows, columns, m, k, n):
    """For each line that comes, the seconds of a layer of SCALE-Sim, and its cycles."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for _ in sys.stdin:
            made = layer(folder, flow, rows, columns, m, k, n)
            started = time.perf_counter()
            made.run()
            made.calc_report_data()
            print(time.perf_counter() - started, made.total_cycles, flush=True)


def main():
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], *map(int, sys.argv[3:]))
        return
    target = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        cases = [
            case(folder, flow, *shape)
            for shape in SHAPES
            for flow in ("ws", "os", "is")
        ]
    versions = {name: version(name) for name in ("scalesim", "numpy")}
    lines = ",\n".join("  " + json.dumps(each) for each in cases)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        f'{{"versions": {json.dumps(versions)},\n "cases": [\n{lines}\n]}}\n'
    )


if __name__ == "__main__":
    main()
