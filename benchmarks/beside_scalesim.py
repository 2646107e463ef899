"""A product of 64³ on 32 × 32 cells: our tables beside SCALE-Sim's, round by round.

SCALE-Sim has an environment of its own (see scripts/golden/tpu_goldens.py):

    python -m benchmarks.beside_scalesim PYTHON [--out FILE]

PYTHON is that environment's. Both sides say what each port asks for in each cycle, how
many cycles there are, the utilisation, and what is read and written. SCALE-Sim also
follows its three memories, which is most of its time and cannot be switched off.
`llmlab/chips/data/tpu_scale_sim.csv`, which the lesson reads, was made with --out.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import time
from pathlib import Path

from llmlab.chips import tpu

SIDE, SIZE = 32, 64
ROUNDS = 21
FLOWS = {"ws": "weight", "os": "output"}
SERVER = Path(__file__).parents[1] / "scripts" / "golden" / "tpu_goldens.py"


def ours(dataflow: str) -> tuple[float, int]:
    """(seconds, cycles) of the same figures."""
    started = time.perf_counter()
    run = tpu.Run(tpu.Array(SIDE, SIDE, dataflow), SIZE, SIZE, SIZE)
    run.demands.counts()
    tpu.report(run)
    int(run.busy.max())
    return time.perf_counter() - started, run.cycles


def rounds(python: str, flow: str) -> list[dict[str, object]]:
    """Seconds of both sides, in turn; one call of each comes before."""
    sizes = [str(size) for size in (SIDE, SIDE, SIZE, SIZE, SIZE)]
    found = []
    with subprocess.Popen(
        [python, str(SERVER), "--serve", flow, *sizes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        for i in range(ROUNDS + 1):
            server.stdin.write("go\n")
            server.stdin.flush()
            seconds, cycles = server.stdout.readline().split()
            mine, _ = ours(FLOWS[flow])
            if i:
                found.append(
                    {
                        "flow": flow,
                        "cycles": int(cycles),
                        "scale_sim_ms": f"{float(seconds) * 1e3:.3f}",
                        "ours_ms": f"{mine * 1e3:.4f}",
                    }
                )
        server.stdin.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = [row for flow in FLOWS for row in rounds(asked.python, flow)]
    for flow in FLOWS:
        ratios = [
            float(row["scale_sim_ms"]) / float(row["ours_ms"])
            for row in rows
            if row["flow"] == flow
        ]
        low, high = min(ratios), max(ratios)
        middle = statistics.median(ratios)
        print(f"{flow}: {middle:.0f} × faster ({low:.0f} to {high:.0f})")
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        with asked.out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
