#!/usr/bin/env bash
# scalesim 3.0.0, a product of 5 × 6 by 6 × 7 on an array of 4 × 3 cells. One would expect
# that with every dataflow the results are written at least once and, where sums stay in
# their cells until they are done ("os"), exactly once: 35 numbers. "os" counts 77: for
# each of the 6 blocks rows + columns = 7 writes too many. And its cycles, 65, are fewer
# than the 90 of the fold formula in SCALE-Sim's own paper, blocks · (2 R + C + K − 2):
# results leave in no time.
#
# Seen: writes 77, cycles 65
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==2.3.5 scalesim==3.0.0
cd "$work"

cat > hw.cfg <<'CONFIG'
[general]
run_name = product
[architecture_presets]
ArrayHeight: 4
ArrayWidth: 3
IfmapSramSzkB: 64
FilterSramSzkB: 64
OfmapSramSzkB: 64
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Dataflow: os
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
CONFIG
printf 'Layer, M, N, K, Sparsity,\nproduct, 5, 7, 6,\n' > topology.csv
{
    printf 'Layer'; printf ', column %d' $(seq 20)
    printf ',\nproduct'; printf ', %d' $(yes 1 | head -20); printf ',\n'
} > layout.csv

"$work/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

from scalesim.layout_utils import layouts
from scalesim.scale_config import scale_config
from scalesim.single_layer_sim import single_layer_sim
from scalesim.topology_utils import topologies

config, topology, layout = scale_config(), topologies(), layouts()
config.read_conf_file("hw.cfg")
topology.load_arrays("topology.csv", mnk_inputs=True)
layout.load_arrays("layout.csv", mnk_inputs=True)
layer = single_layer_sim()
layer.set_params(
    layer_id=0,
    config_obj=config,
    topology_obj=topology,
    layout_obj=layout,
    verbose=False,
)
layer.run()
layer.calc_report_data()
seen = {"writes": int(layer.ofmap_sram_writes), "cycles": int(layer.total_cycles)}
print(version("scalesim"), seen, "results:", 5 * 7, "formula:", 6 * (2 * 4 + 3 + 6 - 2))
sys.exit(seen != {"writes": 77, "cycles": 65})
PYTHON
