"""Where the stored measurements are (see scripts/flash_attention_sweep.py)."""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).parent.parent / "data" / "flash_attention.csv"
