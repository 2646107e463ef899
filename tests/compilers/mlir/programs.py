"""Random programs on blocks: straight lines, and graphs with loops and memory."""

from __future__ import annotations

from random import Random

from llmlab.compilers.mlir.ssa import Block, Function, Value


def random_line(seed: int, length: int = 24) -> Function:
    """One block of arithmetic with many constants, equal and dead values."""
    random = Random(seed)
    block = Block([Value(), Value()])
    values = list(block.arguments)
    for _ in range(length):
        if random.random() < 0.3:
            values.append(block.add("const", number=random.choice((0, 1, 2, -3, 7))))
        else:
            name = random.choice(("add", "sub", "mul"))
            a, b = random.choices(values[-8:], k=2)
            values.append(block.add(name, a, b))
            if random.random() < 0.4:
                # once more, the other way round; both are read
                again = block.add(name, b, a)
                values.append(block.add("sub", again, values[-1]))
    block.add("ret", random.choice(values[-6:]))
    return Function([block])


def random_graph(seed: int, blocks: int = 9, slots: int = 3) -> Function:
    """Blocks that jump forward and, by a counter that ends, back; slots in memory.

    Every slot is written in the entry. The last block returns the sum of all.
    """
    random = Random(seed)
    made = [Block() for _ in range(blocks)]
    entry, end = made[0], made[-1]
    entry.arguments = [Value(), Value()]
    places = [entry.add("slot") for _ in range(slots)]
    counter = entry.add("slot")
    for i, place in enumerate(places):
        entry.add("store", entry.arguments[i % 2], place)
    entry.add("store", entry.add("const", number=0), counter)
    for i, block in enumerate(made[:-1]):
        known = list(entry.arguments)
        for _ in range(random.randrange(4)):
            random_step(block, known, places, random)
        back = i > 0 and random.random() < 0.35
        if back:
            # one more round, at most 12 in all
            count = block.add("load", counter)
            more = block.add("add", count, block.add("const", number=1))
            block.add("store", more, counter)
            again = block.add("less", more, block.add("const", number=12))
            after = (made[random.randrange(i + 1, blocks)], [])
            block.choose(again, (made[random.randrange(1, i + 1)], []), after)
        elif random.random() < 0.6 and i + 2 < blocks:
            a, b = random.sample(range(i + 1, blocks), 2)
            test = block.add("less", *random.choices(known, k=2))
            block.choose(test, (made[a], []), (made[b], []))
        else:
            block.goto(made[random.randrange(i + 1, blocks)])
    total = end.add("const", number=0)
    for place in places:
        total = end.add("add", total, end.add("load", place))
    end.add("ret", total)
    return Function(made)


def random_step(
    block: Block, known: list[Value], places: list[Value], random: Random
) -> None:
    """A load, a store, a sum or a print."""
    choice = random.randrange(5)
    if choice == 0:
        known.append(block.add("load", random.choice(places)))
    elif choice == 1:
        block.add("store", random.choice(known), random.choice(places))
    elif choice == 2:
        block.add("print", random.choice(known))
    elif choice == 3:
        known.append(block.add("const", number=random.randrange(3)))
    else:
        name = random.choice(("add", "mul", "sub"))
        known.append(block.add(name, *random.choices(known, k=2)))
