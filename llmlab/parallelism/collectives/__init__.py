"""The algorithms behind the collectives, as lists of moves.

    schedule   a move, and what runs, times and draws a list of them; start here
    ring       as few bytes as possible, p − 1 steps
    tree       ⌈log₂ p⌉ steps for a broadcast, whole tensors
    halving    recursive halving and doubling: few bytes and few steps, p a power of two
    bruck      ⌈log₂ p⌉ steps for any p

What each collective means is in `runtime.calls`.
"""
