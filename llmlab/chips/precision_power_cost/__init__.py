"""Precision, power and cost: what a chip's work comes to, in joules, dollars and kg.

energy.py        joules per operation and per byte; where they go
price.py         dollars per million tokens, and per training run
reliability.py   failures, and how often to save
carbon.py        emissions of running and of making

Start with `share_lost` in reliability.py, then `joules` in energy.py. The printed
energies are in `llmlab/chips/data/energy.csv`.
"""

from llmlab.chips.precision_power_cost import carbon, energy, price, reliability

__all__ = ["carbon", "energy", "price", "reliability"]
