"""The same blocks in MLIR's words, with block arguments, and LLVM's, with phis."""

from __future__ import annotations

from llmlab.compilers.mlir.ssa import Block, Function, Op, Value, numbered, sides

MLIR_WORDS = {
    "add": "arith.addi {} : i32",
    "sub": "arith.subi {} : i32",
    "mul": "arith.muli {} : i32",
    "less": "arith.cmpi slt, {} : i32",
}
LLVM_WORDS = {
    "add": "add i32 {}",
    "sub": "sub i32 {}",
    "mul": "mul i32 {}",
    "less": "icmp slt i32 {}",
}


def as_mlir(function: Function) -> str:
    """In the dialects func, arith and cf. Slots and prints have no words there.

    Raises:
        ValueError: an operation that has none.
    """
    names = numbered(function, "%v")
    labels = {block: f"^b{i}" for i, block in enumerate(function.blocks)}

    def typed(values: list[Value]) -> str:
        return ", ".join(f"{names[v]}: {v.type}" for v in values)

    def listed(values: list[Value]) -> str:
        return ", ".join(names.get(v, "%undefined") for v in values)

    def handed(block: Block, values: list[Value]) -> str:
        kinds = ", ".join(value.type for value in values)
        given = f"({listed(values)} : {kinds})" if values else ""
        return f"{labels[block]}{given}"

    def words(op: Op) -> str:
        read = listed(op.operands)
        if op.name in MLIR_WORDS:
            return f"{names[op.result]} = {MLIR_WORDS[op.name].format(read)}"
        if op.name == "const":
            return f"{names[op.result]} = arith.constant {op.number} : i32"
        targets = [handed(*target) for target in op.targets]
        if op.name == "ret":
            return f"func.return {read} : i32"
        if op.name == "br":
            return f"cf.br {targets[0]}"
        if op.name == "cond_br":
            return f"cf.cond_br {', '.join([read, *targets])}"
        raise ValueError(f"{op.name} has no words in func, arith and cf")

    entry = function.blocks[0]
    text = [f"func.func @f({typed(entry.arguments)}) -> i32 {{"]
    for block in function.blocks:
        if block is not entry:
            args = f"({typed(block.arguments)})" if block.arguments else ""
            text.append(f"{labels[block]}{args}:")
        text += [f"  {words(op)}" for op in block.ops]
    return "\n".join([*text, "}"])


def as_llvm(function: Function) -> str:
    """LLVM's own text. An argument of a block becomes a phi."""
    names = numbered(function, "%v")
    labels = {block: f"b{i}" for i, block in enumerate(function.blocks)}

    def words(op: Op) -> str:
        read = [names[value] for value in op.operands]
        if op.name in LLVM_WORDS:
            return f"{names[op.result]} = {LLVM_WORDS[op.name].format(', '.join(read))}"
        to = [f"label %{labels[block]}" for block, _ in op.targets]
        return {
            "const": lambda: f"{names[op.result]} = add i32 {op.number}, 0",
            "slot": lambda: f"{names[op.result]} = alloca i32",
            "load": lambda: f"{names[op.result]} = load i32, ptr {read[0]}",
            "store": lambda: f"store i32 {read[0]}, ptr {read[1]}",
            "print": lambda: f"call void @print(i32 {read[0]})",
            "ret": lambda: f"ret i32 {read[0]}",
            "br": lambda: f"br {to[0]}",
            "cond_br": lambda: f"br i1 {read[0]}, {to[0]}, {to[1]}",
        }[op.name]()

    entry = function.blocks[0]
    args = ", ".join(f"{value.type} {names[value]}" for value in entry.arguments)
    text = ["declare void @print(i32)", f"define i32 @f({args}) {{"]
    for block in function.blocks:
        text.append(f"{labels[block]}:")
        if block is not entry:
            text += [f"  {line}" for line in phis(function, block, names, labels)]
        text += [f"  {words(op)}" for op in block.ops]
    return "\n".join([*text, "}"])


def phis(
    function: Function,
    block: Block,
    names: dict[Value, str],
    labels: dict[Block, str],
) -> list[str]:
    """One for each argument: the value that each side hands over."""
    before = sides(function, block)
    return [
        f"{names[argument]} = phi {argument.type} "
        + ", ".join(f"[ {names[v[i]]}, %{labels[b]} ]" for b, v in before)
        for i, argument in enumerate(block.arguments)
    ]
