"""TPU: a systolic array, cycle by cycle, and what is around it.

array.py      an array and a product: folds, cycles, utilisation, reads and writes
registers.py  the same array register by register, with numbers that move
shapes.py     generations of TPUs; the shapes of models on them, tiles and padding
torus.py      chips on a torus: how long collectives take on it
pallas.py     kernels for a TPU, run by JAX's interpreter
"""
