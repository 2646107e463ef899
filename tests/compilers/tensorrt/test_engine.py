"""Placement, layers, tactics, and the engine that comes of them."""

from __future__ import annotations

import json

import pytest
import torch

from llmlab.compilers import tensorrt as trt
from llmlab.compilers.front_end import OPS, CannotCapture, Graph, made, one_by_one, run
from llmlab.compilers.front_end import traffic as plain_traffic
from llmlab.compilers.tensorrt import tactics
from llmlab.models import codes
from tests.compilers.tensorrt import programs

CASES = {
    "block": (programs.block, programs.block_case),
    "two_layers": (programs.two_layers, programs.two_case),
    "with_bias": (programs.with_bias, programs.bias_case),
}


def network_of(name, profiles=()):
    function, case = CASES[name]
    x, weights = case()
    return trt.define(function, [x], weights, profiles), x, weights, function


def quantised(name, form="int8", residuals=False, carry=True, profiles=()):
    network, x, weights, function = network_of(name, profiles)
    values = trt.quantised_values(network.graph, network.weights, residuals)
    seen = trt.observe(network, values, [[x]])
    scales = {node: trt.scale_of(h, "max", form) for node, h in seen.items()}
    return trt.quantise(network, scales, form, residuals, carry), x, weights, function


def reference(network, x, weights):
    """The program with Q and DQ, node by node."""
    return run(network.graph, x, *weights.values())[0]


# Placement ----------------------------------------------------------------------------


def count(graph: Graph, op: str) -> int:
    return sum(node.op == op for node in graph.nodes)


@pytest.mark.parametrize(("name", "values"), [("block", 2), ("two_layers", 2)])
def test_each_product_with_a_weight_has_its_inputs_quantised(name, values):
    network, *_ = quantised(name, carry=False)
    network.graph.check()
    assert len(trt.quantised_values(network_of(name)[0].graph, [])) == 0
    products = [node for node in network.graph.nodes if node.op == "matmul"]
    for node in products:
        assert [each.op for each in node.inputs] == ["dequantize", "dequantize"]
        assert trt.operands_format(node) == "int8"
        assert node.inputs[0].inputs[1].type.shape == ()  # one scale
        assert max(node.inputs[1].inputs[1].type.shape) == node.type.shape[-1]
    assert count(network.graph, "quantize") == values + len(products)


@pytest.mark.parametrize(("name", "more"), [("block", 1), ("with_bias", 0)])
def test_a_residual_gets_a_scale_of_its_own_or_shares_one(name, more):
    """The block adds what no product reads; `with_bias` what its first reads."""
    network = network_of(name)[0]
    few = trt.quantised_values(network.graph, network.weights)
    many = trt.quantised_values(network.graph, network.weights, residuals=True)
    assert set(few) <= set(many)
    assert len(many) - len(few) == more
    assert not more or network.graph.inputs[0] in many


def test_gate_and_up_share_their_input():
    network, *_ = quantised("block", carry=False)
    gate, up = [n for n in network.graph.nodes if n.op == "matmul"][:2]
    assert gate.inputs[0] is up.inputs[0]


@pytest.mark.parametrize("residuals", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_carrying_changes_no_number(name, residuals):
    before, x, weights, _ = quantised(name, residuals=residuals, carry=False)
    after, *_ = quantised(name, residuals=residuals)
    torch.testing.assert_close(
        reference(after, x, weights), reference(before, x, weights), rtol=0, atol=0
    )


def scaled_by_max(function, x, form="int8", carry=True, **weights):
    """A network of one input with Q and DQ."""
    network = trt.define(function, [x], weights)
    values = trt.quantised_values(network.graph, network.weights)
    seen = trt.observe(network, values, [[x]])
    scales = {node: trt.scale_of(h, "max", form) for node, h in seen.items()}
    return trt.quantise(network, scales, form, carry=carry)


def largest_of_an_input(x, w):
    return x.amax(0, keepdim=True) @ w


def largest_beside_a_reader(x, w):
    y = x @ w
    return y.amax(0, keepdim=True) @ w, y + x


def largest_under_another_shape(x, w):
    return x.reshape(2, 4, 8).amax(0) @ w


@pytest.mark.parametrize(
    "function",
    [largest_of_an_input, largest_beside_a_reader, largest_under_another_shape],
)
def test_codes_are_not_carried_where_that_moves_more(function):
    x, w = programs.numbers(8, 8), programs.numbers(8, 8, salt=2)
    apart, carried = (
        trt.traffic(trt.fuse_layers(trt.split(network).after))
        for network in (
            scaled_by_max(function, x, w=w, carry=False),
            scaled_by_max(function, x, w=w),
        )
    )
    assert carried <= apart


@pytest.mark.parametrize("form", ["int8", "e4m3"])
@pytest.mark.parametrize("shape", [(8, 5), (8, 8)])
def test_a_weight_that_is_read_both_ways(shape, form):
    """Its scales are those of one product's columns, and of the other's rows."""
    x, w = programs.numbers(6, 8), programs.numbers(*shape, salt=4)
    w = w * torch.arange(1.0, 1 + shape[1])
    network = scaled_by_max(lambda x, w: torch.tanh(x @ w) @ w.mT, x, form, w=w)
    engine = trt.build(network, repeat=1)
    values = {**engine.stored, engine.inputs[0]: x}
    for layer in engine.layers:
        for tactic in trt.tactics_for(layer):
            ready = trt.prepare(layer, tactic, engine.stored)
            found = trt.run_layer(layer, tactic, values, ready)
        values.update(found)
    (wanted,) = run(network.graph, x, w)
    torch.testing.assert_close(values[engine.after.outputs[0]], wanted)


def test_a_batch_of_weights_stays_in_floats():
    x, w = programs.numbers(2, 3, 4), programs.numbers(2, 4, 5, salt=2)
    network = scaled_by_max(lambda x, w: x @ w, x, w=w)
    assert count(network.graph, "quantize") == 0
    torch.testing.assert_close(trt.build(network, repeat=1)(x)[0], x @ w)


def test_q_goes_above_relu():
    network, *_ = quantised("with_bias")
    relu = next(
        n
        for n in network.graph.nodes
        if n.op == "maximum" and trt.stored_format(n) == "int8"
    )
    assert relu.inputs[0].op == "quantize"
    assert trt.stored_bytes(relu) == relu.type.bytes // 4


def carried(function, *shapes):
    """f(DQ(q)) or Q(f(x)), carried."""
    from llmlab.compilers.front_end import Node, Type, constant

    x = Node("input", (), Type(shapes[0]))
    scale = constant(0.5)
    nodes = [x, scale]

    def add(op, inputs, attributes=()):
        nodes.append(made(op, inputs, attributes))
        return nodes[-1]

    zero = constant(0.0)
    nodes.append(zero)
    out = function(x, scale, zero, add)
    graph = Graph([x], nodes, [out])
    after = trt.carried(graph)
    value = programs.numbers(*shapes[0], salt=3, scale=80)
    assert torch.equal(run(graph, value)[0], run(after, value)[0])
    return [node.op for node in after.work]


INT8 = ("int8",)


def test_what_moves_and_what_does_not():
    def relu_q(x, s, zero, add):
        return add("quantize", [add("maximum", [x, zero]), s], INT8)

    def reshape_q(x, s, zero, add):
        return add("quantize", [add("reshape", [x], ((12,),)), s], INT8)

    def gelu_like(x, s, zero, add):
        return add("quantize", [add("tanh", [x]), s], INT8)

    def there_and_back(x, s, zero, add):
        codes = add("quantize", [x, s], INT8)
        again = add("quantize", [add("dequantize", [codes, s]), s], INT8)
        return add("dequantize", [again, s])

    def down(x, s, zero, add):
        codes = add("quantize", [x, s], INT8)
        value = add("dequantize", [codes, s])
        return add("maximum", [add("reshape", [value], ((3, 4),)), zero])

    def read_twice(x, s, zero, add):
        relu = add("maximum", [x, zero])
        return add("add", [add("quantize", [relu, s], INT8), relu])

    shape = (2, 6)
    assert carried(relu_q, shape) == ["quantize", "maximum"]
    assert carried(reshape_q, shape) == ["quantize", "reshape"]
    assert carried(gelu_like, shape) == ["tanh", "quantize"]
    assert carried(there_and_back, shape) == ["quantize", "dequantize"]
    assert carried(down, shape) == ["quantize", "reshape", "maximum", "dequantize"]
    assert carried(read_twice, shape) == ["maximum", "quantize", "add"]


def test_scales_must_be_there():
    network, *_ = network_of("block")
    values = trt.quantised_values(network.graph, network.weights)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"value 1 .*above zero"):
            trt.quantise(network, {values[0]: 1.0, values[1]: bad})
    with pytest.raises(ValueError, match="batches is empty"):
        trt.observe(network, values, [])


# Layers -------------------------------------------------------------------------------


def test_layers_of_the_block():
    network, *_ = network_of("block")
    parts = trt.split(network)
    layers = trt.fuse_layers(parts.after)
    assert [len(layer.products) for layer in layers] == [0, 2, 1]
    apart = trt.fuse_layers(parts.after, horizontal=False)
    assert [len(layer.products) for layer in apart] == [0, 1, 1, 1]
    one = plain_traffic(one_by_one(network.graph))
    assert trt.traffic(layers) < trt.traffic(apart) < one


def test_int8_layers_read_and_write_codes():
    network, *_ = quantised("block")
    layers = trt.fuse_layers(trt.split(network).after)
    assert [layer.precision for layer in layers] == ["f32", "int8", "int8"]
    for layer in layers[:2]:
        assert [trt.stored_format(root) for root in layer.roots] == ["int8"]
    T, d, f = 16, 32, 48
    codes = T * d + 2 * f * d + T * f  # x, two weights, what is written
    assert layers[1].traffic == codes + 2 * f * 4  # and a scale for each column


def test_a_residual_in_codes_is_read_in_a_byte():
    plain = trt.fuse_layers(trt.split(quantised("with_bias")[0]).after)
    codes = trt.fuse_layers(trt.split(quantised("with_bias", residuals=True)[0]).after)
    T, d = 12, 24
    assert [str(layer) for layer in plain][-1].endswith("matmul add")
    assert plain[-1].traffic - codes[-1].traffic == T * d * 3


def test_weights_are_stored_as_codes_and_not_as_floats():
    network, *_ = quantised("two_layers")
    parts = trt.split(network)
    assert {node.attributes[0] for node in parts.stored} == {"int8", None}
    engine = trt.build(network)
    kinds = {value.dtype for value in engine.stored.values()}
    assert kinds == {torch.int8, torch.float32}
    matrices = [v for v in engine.stored.values() if v.dtype == torch.int8]
    assert engine.bytes == sum(m.numel() for m in matrices) + 4 * (24 + 40)


def test_a_layer_that_needs_the_other_is_not_joined_with_it():
    def after_each_other(x, w1, w2):
        y = torch.tanh(x @ w1)
        return (x @ w2) @ y.mT @ x

    x = programs.numbers(6, 6)
    weights = {"w1": programs.numbers(6, 6, salt=2), "w2": programs.numbers(6, 6)}
    engine = trt.build(trt.define(after_each_other, [x], weights))
    wanted = after_each_other(x, *weights.values())
    torch.testing.assert_close(engine(x)[0], wanted, rtol=1e-4, atol=1e-4)


def test_q_k_v_are_one_layer_with_three_results():
    def qkv(x, q, k, v):
        scores = (x @ q) @ (x @ k).mT
        return torch.softmax(scores, -1) @ (x @ v)

    x = programs.numbers(5, 8)
    weights = {name: programs.numbers(8, 4, salt=i) for i, name in enumerate("qkv", 1)}
    network = trt.define(qkv, [x], weights)
    engine = trt.build(network)
    assert max(len(layer.products) for layer in engine.layers) == 3
    torch.testing.assert_close(engine(x)[0], qkv(x, *weights.values()))


# Engine -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_float_engine_computes_the_function(name):
    network, x, weights, function = network_of(name)
    engine = trt.build(network, repeat=1)
    torch.testing.assert_close(engine(x)[0], function(x, *weights.values()))


@pytest.mark.parametrize("form", ["int8", "e4m3", "e5m2"])
@pytest.mark.parametrize("residuals", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_quantised_engine_computes_its_program(name, residuals, form):
    network, x, weights, function = quantised(name, form, residuals)
    engine = trt.build(network, repeat=1)
    found = engine(x)[0]
    assert programs.rows_agree(found, reference(network, x, weights))
    exact = function(x, *weights.values())
    far = {"int8": 0.03, "e4m3": 0.06, "e5m2": 0.12}[form] * exact.abs().max()
    assert 0 < (found - exact).abs().max() < far


@pytest.mark.parametrize("name", CASES)
def test_every_tactic_computes_the_same(name):
    for network, x in (quantised(name)[:2], network_of(name)[:2]):
        engine = trt.build(network, repeat=1)
        values = {**engine.stored, engine.inputs[0]: x}
        for layer in engine.layers:
            results = []
            for tactic in trt.tactics_for(layer):
                ready = trt.prepare(layer, tactic, engine.stored)
                results.append(trt.run_layer(layer, tactic, values, ready))
            for other in results[1:]:
                for root, value in results[0].items():
                    exact = layer.precision == "int8"
                    torch.testing.assert_close(
                        other[root].float(),
                        value.float(),
                        rtol=0 if exact else 1e-5,
                        atol=0 if exact else 1e-5,
                    )
            values.update(results[0])


def test_codes_in_floats_only_where_they_are_exact():
    """1,040 products of 127 · 127 fit below 2²⁴; 1,041 do not."""

    def product(x, w):
        return x @ w

    for inner, allowed in ((1040, True), (1041, False)):
        x, w = torch.ones(2, inner), {"w": torch.ones(inner, 3)}
        network = trt.define(product, [x], w)
        (value,) = trt.quantised_values(network.graph, network.weights)
        network = trt.quantise(network, {value: 1 / 127})
        (_, layer) = trt.fuse_layers(trt.split(network).after)
        kinds = {tactic.arithmetic for tactic in trt.tactics_for(layer)}
        assert ("codes in floats" in kinds) == allowed
        engine = trt.build(network, repeat=1)
        assert torch.allclose(engine(x)[0], torch.full((2, 3), float(inner)))


def test_where_int8_products_are_wrong_they_are_not_used(monkeypatch):
    monkeypatch.setattr(codes, "sums_are_exact", lambda: False)
    network, x, weights, _ = quantised("two_layers")
    engine = trt.build(network, repeat=1)
    names = {t.arithmetic for each in engine.layers for t in trt.tactics_for(each)}
    assert names == {"floats", "int32", "codes in floats"}
    assert programs.rows_agree(engine(x)[0], reference(network, x, weights))


def test_a_product_of_two_inputs_has_one_tactic():
    def scores(q, k):
        return q @ k.mT

    q, k = programs.numbers(3, 4), programs.numbers(5, 4)
    engine = trt.build(trt.define(scores, [q, k], {}))
    assert [len(trt.tactics_for(layer)) for layer in engine.layers] == [1]
    torch.testing.assert_close(engine(q, k)[0], scores(q, k))


# Timing cache -------------------------------------------------------------------------


class Clock:
    """Seconds that are known: each tactic takes what it is told to."""

    def __init__(self, takes):
        self.takes = list(takes)
        self.calls = 0
        self.now = 0.0

    def __call__(self):
        self.calls += 1
        if self.calls % 2 == 0:
            self.now += self.takes[(self.calls // 2 - 1) % len(self.takes)]
        return self.now


def test_the_fastest_is_picked_and_remembered():
    network, x, *_ = network_of("two_layers")
    engine = trt.build(network, repeat=1)
    layer = engine.layers[0]
    names = [str(tactic) for tactic in trt.tactics_for(layer)]
    assert names == ["floats", "floats, packed"]
    values = {**engine.stored, engine.inputs[0]: x}
    for slow in (0, 1):
        cache = trt.TimingCache()
        takes = [1.0, 1.0]
        takes[slow] = 2.0
        picked = trt.pick(layer, values, cache, repeat=2, clock=Clock(takes))
        assert str(picked) == names[1 - slow]
        (times,) = cache.times.values()
        assert times == dict(zip(names, takes, strict=True))

        def broken():
            raise AssertionError("it is timed again")

        assert trt.pick(layer, values, cache, clock=broken) == picked
        assert (cache.hits, cache.misses) == (1, 1)


def test_layers_that_look_alike_are_timed_once():
    def deep(x, *weights):
        for w in weights:
            x = torch.tanh(x @ w)
        return x

    x = programs.numbers(4, 6)
    weights = {f"w{i}": programs.numbers(6, 6, salt=i) for i in range(5)}
    cache = trt.TimingCache()
    trt.build(trt.define(deep, [x], weights), cache, repeat=1)
    assert (cache.misses, cache.hits) == (1, 4)
    trt.build(trt.define(deep, [x[:3]], weights), cache, repeat=1)
    assert cache.misses == 2  # other rows, another time


def test_a_cache_on_disk(tmp_path, monkeypatch):
    cache = trt.TimingCache({"key": {"floats": 1e-3}})
    file = tmp_path / "timing.json"
    cache.save(file)
    assert trt.TimingCache.load(file).times == cache.times
    here = tactics.machine()
    for key in here:
        monkeypatch.setattr(tactics, "machine", lambda k=key: {**here, k: "other"})
        with pytest.raises(ValueError, match=f"{key} .*'other'"):
            trt.TimingCache.load(file)
        assert trt.TimingCache.load(file, other_machine=True).times == cache.times
    file.write_text(json.dumps({"version": 0, "times": {}}))
    with pytest.raises(ValueError, match="version 0"):
        trt.TimingCache.load(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="no timing cache"):
        trt.TimingCache.load(file)


# Refit, save, profiles, plugins -------------------------------------------------------


def test_refit_is_a_build_with_the_new_weight():
    network, x, weights, _ = quantised("block")
    engine = trt.build(network, refit=True, repeat=1)
    first = engine(x)[0]
    new = programs.numbers(32, 48, salt=11, scale=0.7)
    engine.refit("down", new)
    other = {**weights, "down": new}
    assert programs.rows_agree(engine(x)[0], reference(network, x, other))
    assert not programs.rows_agree(engine(x)[0], first)
    engine.refit("down", weights["down"])
    assert torch.equal(engine(x)[0], first)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("dwon", torch.ones(32, 48), "'dwon' is not one of down, gain, gate, up"),
        ("down", torch.ones(48, 32), r"shape \(48, 32\)"),
        ("down", torch.ones(32, 48, dtype=torch.float64), "float64"),
        ("down", torch.full((32, 48), torch.nan), "NaN"),
        ("down", torch.ones(32, 48, dtype=torch.int64), "of floats"),
    ],
)
def test_refit_refuses_and_leaves_the_engine(name, value, words):
    network, x, *_ = network_of("block")
    engine = trt.build(network, refit=True, repeat=1)
    before = engine(x)[0]
    with pytest.raises(ValueError, match=words):
        engine.refit(name, value)
    assert torch.equal(engine(x)[0], before)


def test_without_refit_no_weight_is_kept():
    network, *_ = quantised("block")
    engine = trt.build(network, repeat=1)
    assert not engine.weights
    with pytest.raises(ValueError, match="refit=True"):
        engine.refit("down", torch.ones(32, 48))


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("form", ["int8", "e4m3", None])
def test_saved_and_loaded(tmp_path, form, refit):
    if form is None:
        network, x, weights, _ = network_of("block")
    else:
        network, x, weights, _ = quantised("block", form)
    engine = trt.build(network, refit=refit, repeat=1)
    engine.save(tmp_path)
    loaded = trt.load_engine(tmp_path)
    assert torch.equal(loaded(x)[0], engine(x)[0])
    assert trt.summary(loaded) == trt.summary(engine)
    if refit:
        loaded.refit("up", 2 * weights["up"])
        engine.refit("up", 2 * weights["up"])
        assert torch.equal(loaded(x)[0], engine(x)[0])


def changed(folder, **values):
    file = folder / "engine.json"
    text = json.loads(file.read_text())
    text.update(values)
    file.write_text(json.dumps(text))


def test_what_is_no_engine_of_ours_is_refused(tmp_path):
    network, x, *_ = network_of("two_layers")
    engine = trt.build(network, repeat=1)
    engine.save(tmp_path)
    machine = json.loads((tmp_path / "engine.json").read_text())["machine"]
    changed(tmp_path, machine={**machine, "processor": "abacus"})
    with pytest.raises(ValueError, match="processor 'abacus'"):
        trt.load_engine(tmp_path)
    assert torch.equal(trt.load_engine(tmp_path, True)(x)[0], engine(x)[0])
    changed(tmp_path, version=99)
    with pytest.raises(ValueError, match="version 99"):
        trt.load_engine(tmp_path)
    (tmp_path / "engine.json").write_text("[]")
    with pytest.raises(ValueError, match="no engine"):
        trt.load_engine(tmp_path)
    with pytest.raises(ValueError, match=r"holds no engine\.json"):
        trt.load_engine(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["block", "two_layers"])
def test_rows_of_a_profile(name):
    profiles = [trt.Profile(1, 4, 9), trt.Profile(1, 32, 64)]
    network, x, weights, function = network_of(name, profiles)
    engine = trt.build(network, repeat=1)
    for rows in (1, 3, 9, 12):
        few = x[:rows]
        torch.testing.assert_close(engine(few)[0], function(few, *weights.values()))
    assert engine.plan_for([x[:9]]).profile == profiles[0]
    assert engine.plan_for([x[:10]]).profile == profiles[1]
    with pytest.raises(ValueError, match=r"\[65\] rows; profiles: 1 to 9, 1 to 64"):
        engine(x[:1].expand(65, -1))
    with pytest.raises(ValueError, match="another first dimension"):
        engine(x[:, :3])


def test_profiles_with_codes_and_on_disk(tmp_path):
    profiles = [trt.Profile(1, 12, 30)]
    network, x, weights, _ = quantised("two_layers", profiles=profiles)
    engine = trt.build(network, repeat=1)
    engine.save(tmp_path)
    wanted = reference(network, x, weights)
    loaded = trt.load_engine(tmp_path)
    assert programs.rows_agree(loaded(x[:5])[0], wanted[:5], share=0.6)


def test_a_program_that_depends_on_the_rows_has_no_profile():
    def halves(x):
        return x.reshape(2, -1)

    def mean_of_all(x):
        return x - x.sum(0, keepdim=True) / x.shape[0]

    def scores(x):
        return x @ x.mT

    for function in (halves, mean_of_all, scores):
        with pytest.raises(ValueError, match="rows the program is another one"):
            trt.define(function, [torch.ones(4, 6)], {}, [trt.Profile(2, 4, 8)])


@pytest.mark.parametrize("sizes", [(0, 1, 2), (3, 2, 4), (1, 5, 4)])
def test_profiles_are_in_order(sizes):
    with pytest.raises(ValueError, match="least ≤ usual ≤ most"):
        trt.Profile(*sizes)


def test_a_call_with_another_shape_is_refused():
    network, x, *_ = network_of("two_layers")
    engine = trt.build(network, repeat=1)
    with pytest.raises(ValueError, match=r"called with f32\[11, 24\]; built for"):
        engine(x[:11])
    with pytest.raises(ValueError, match="built for"):
        engine(x, x)


@pytest.fixture
def cumulative():
    name = "cumulative_sum"
    trt.register_plugin(
        name, lambda shapes, _: shapes[0], lambda x, a: x[0].cumsum(a[0])
    )
    yield name
    OPS.pop(name, None)


def test_a_plugin_is_a_layer_of_its_own(cumulative, tmp_path):
    def summed(x, w):
        return torch.exp(trt.plugin(cumulative, -(x @ w), attributes=(1,)) * 0.1)

    x, weights = programs.numbers(4, 6), {"w": programs.numbers(6, 5, scale=0.3)}
    engine = trt.build(trt.define(summed, [x], weights), repeat=1)
    names = [str(layer) for layer in engine.layers]
    assert names == ["matmul neg", "cumulative_sum", "mul exp"]
    torch.testing.assert_close(engine(x)[0], summed(x, weights["w"]))
    engine.save(tmp_path)
    with pytest.raises(ValueError, match="there is an operation of this name"):
        trt.register_plugin(cumulative, lambda s, _: s[0], lambda x, _: x[0])
    OPS.pop(cumulative)
    with pytest.raises(ValueError, match="'cumulative_sum', which is not known here"):
        trt.load_engine(tmp_path)
    with pytest.raises(ValueError, match="is not registered"):
        trt.plugin(cumulative, x)


def test_weights_are_checked():
    with pytest.raises(ValueError, match="'w' holds NaN"):
        trt.define(lambda x, w: x @ w, [torch.ones(2, 2)], {"w": torch.ones(2, 2) / 0})
    with pytest.raises(CannotCapture):
        trt.define(lambda x: x.cumsum(1), [torch.ones(2, 2)], {})


def test_a_layer_may_be_long():
    def long(x):
        for _ in range(700):
            x = torch.tanh(x) + 1.0
        return x

    x = programs.numbers(2, 3)
    engine = trt.build(trt.define(long, [x], {}))
    assert len(engine.layers) == 1
    torch.testing.assert_close(engine(x)[0], long(x))
