"""Protocol Buffers' text format, and config.pbtxt in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.inference.model_server import pbtxt
from llmlab.inference.model_server.config import Batching, read_config
from llmlab.inference.model_server.pbtxt import Message, Word

IO = """
input [ { name: "X" data_type: TYPE_FP32 dims: [ 8 ] } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ 1 ] } ]
"""


def plain(message):
    """(name, value) of all fields, messages as lists, words with a dot."""
    found = []
    for field in message.fields:
        value = field.value
        if isinstance(value, Message):
            value = plain(value)
        elif isinstance(value, Word):
            value = "." + value.name
        found.append((field.name, value))
    return found


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", []),
        ("# only a comment", []),
        ('a: "x"', [("a", "x")]),
        ("a: 'it is \"x\"'", [("a", 'it is "x"')]),
        ('a: "one" "two"', [("a", "onetwo")]),
        (r'a: "\"\\\n\t\'"', [("a", "\"\\\n\t'")]),
        ("a: -3, b: 2.5; c: 1e3", [("a", -3), ("b", 2.5), ("c", 1000.0)]),
        ("a: KIND_CPU b: true", [("a", ".KIND_CPU"), ("b", ".true")]),
        ("a { b: 1 }", [("a", [("b", 1)])]),
        ("a: { b: 1 }", [("a", [("b", 1)])]),
        ("a: [ 1, 2 ]", [("a", 1), ("a", 2)]),
        ("a: 1 a: 2", [("a", 1), ("a", 2)]),
        ("a: [ ]", []),
        ("a [ { b: 1 }, { b: 2 } ]", [("a", [("b", 1)]), ("a", [("b", 2)])]),
        ("a { b { c { } } }", [("a", [("b", [("c", [])])])]),
        ("a:1# end\nb:2", [("a", 1), ("b", 2)]),
    ],
)
def test_what_is_read(text, fields):
    assert plain(pbtxt.read(text)) == fields


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a 1", "line 1: '1' where ':' or '{'"),
        ("\n\na: }", "line 3: '}' where a value"),
        ("a { b: 1", "'the end of the file' where a field or the '}' of line 1"),
        ("a: [ 1 2 ]", "line 1: '2' where ',' or ']'"),
        ("a: 1 }", "'}' where a field"),
        ('a: "open', "line 1: '\"open' cannot be read"),
        (r'a: "\q"', r"the escape '\\q'"),
        ("a: 12abc", "'12abc' cannot be read"),
        ("a [ 1 ]", "'1' where ':' or '{'"),
        ("a {" * 30, "more than 20 messages deep"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(text, told):
    with pytest.raises(ValueError) as error:
        pbtxt.read(text)
    assert told in str(error.value)


@given(st.text(alphabet='ab{}[]:,;"\\# \n1.-', max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        pbtxt.read(text)
    except ValueError as error:
        assert "line" in str(error)


def test_a_configuration():
    config = read_config(
        'name: "m" backend: "python" max_batch_size: 16'
        + IO
        + """
        dynamic_batching {
          preferred_batch_size: [ 8, 4 ]
          max_queue_delay_microseconds: 20000
          default_queue_policy { max_queue_size: 7 }
        }
        instance_group [ { kind: KIND_CPU count: 2 }, { count: 3 } ]
        parameters { key: "a" value { string_value: "b" } }
        """,
        "m",
    )
    assert config.batching == Batching((4, 8), 0.02, 16, 7)
    assert config.instances == 5
    assert config.parameters == {"a": "b"}
    assert config.shape(config.inputs[0]) == (-1, 8)
    assert not config.is_ensemble


def test_without_preferred_sizes_the_largest_batch_is_preferred():
    text = 'backend: "python" max_batch_size: 6 dynamic_batching { }' + IO
    batching = read_config(text, "m").batching
    assert (batching.preferred, batching.delay) == ((6,), 0.0)


def test_without_a_batch_shapes_are_the_dims():
    config = read_config('backend: "python"' + IO, "m")
    assert config.shape(config.inputs[0]) == (8,)
    assert config.name == "m"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\nmax_batch: 3", "line 2: max_batch is not served here"),
        ("sequence_batching { }", "line 1: sequence_batching is not served here"),
        ("max_batch_size: 1 max_batch_size: 2", "max_batch_size stands there twice"),
        ('max_batch_size: "1"', "line 1: max_batch_size must be a whole number"),
        ("max_batch_size: 1.5", "must be a whole number"),
        ("backend: python", "backend must be a text in quotes"),
        ("instance_group [ { kind: KIND_GPU } ]", "kind is KIND_GPU, and served are"),
        ("input: 3", "input must be { … }"),
        ('input { name: "X" data_type: TYPE_BF16 }', "data_type is TYPE_BF16"),
        ('name: "other" backend: "python"' + IO, "the folder is called 'm'"),
        (IO, "give a backend"),
        ('platform: "tensorflow_savedmodel"' + IO, "give a backend"),
        ('backend: "python"', "there is no input"),
        ('backend: "python" input { name: "X" dims: 1 }', "an input has no data_type"),
        (
            'backend: "python" input { name: "X" data_type: TYPE_FP32 dims: 0 }',
            "dims [0] of X",
        ),
        ('backend: "python"' + IO + IO, "two of input have the same name"),
        ('backend: "python" max_batch_size: -1' + IO, "max_batch_size=-1"),
        ('backend: "python" dynamic_batching { }' + IO, "needs a max_batch_size"),
        (
            'backend: "python" max_batch_size: 4'
            " dynamic_batching { preferred_batch_size: 8 }" + IO,
            "8 must be 1 … 4",
        ),
        (
            'backend: "python" instance_group [ { count: 0 } ]' + IO,
            "count=0 must be 1 or more",
        ),
        ('platform: "ensemble"' + IO, "has ensemble_scheduling"),
        (
            'backend: "python" ensemble_scheduling { step { model_name: "a" } }' + IO,
            "only an ensemble, has ensemble_scheduling",
        ),
        (
            'platform: "ensemble" ensemble_scheduling { step { } }' + IO,
            "a step has no model_name",
        ),
        (
            'platform: "ensemble" ensemble_scheduling { step { model_name: "a"'
            ' input_map { key: "X" value: "x" } input_map { key: "X" value: "y" } } }'
            + IO,
            "input_map of a",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_its_name(text, told):
    with pytest.raises(ValueError) as error:
        read_config(text, "m")
    assert told in str(error.value)
    assert str(error.value).startswith("m/config.pbtxt: ")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_batch": 0}, "max_batch=0"),
        ({"delay": -1.0}, "delay=-1.0"),
        ({"delay": float("nan")}, "delay=nan"),
        ({"max_queue": -1}, "max_queue=-1"),
        ({"preferred": (0,), "max_batch": 4}, "0 must be 1 … 4"),
    ],
)
def test_batching_that_cannot_be(settings, told):
    with pytest.raises(ValueError, match=told.replace("(", r"\(")):
        Batching(**settings)
