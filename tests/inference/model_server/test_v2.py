"""KServe v2: tensors in JSON and in binary, there and back, and beside tritonclient."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tritonclient.utils import serialize_byte_tensor

from llmlab.inference.model_server import v2
from llmlab.inference.model_server.config import ModelConfig, TensorConfig
from llmlab.inference.model_server.v2 import (
    InferRequest,
    Refused,
    check_inputs,
    infer_response,
    parse_infer_request,
    read_tensor,
    write_tensor,
)

NUMBERS = [name for name in v2.NUMPY if name != "BYTES"]


def entry(**changes):
    made = {"name": "X", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}
    return {k: v for k, v in {**made, **changes}.items() if v is not None}


@pytest.mark.parametrize("datatype", NUMBERS)
def test_numbers_there_and_back_in_binary(datatype):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(v2.NUMPY[datatype])
    raw = v2.to_bytes(array)
    again = v2.from_bytes(raw, datatype, (2, 3))
    assert again.dtype == array.dtype
    assert np.array_equal(again, array)
    assert v2.datatype_of(array) == datatype
    if datatype != "FP16":
        again = read_tensor(json.loads(json.dumps(write_tensor("X", array))))
        assert again.dtype == array.dtype and np.array_equal(again, array)


@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_every_float_comes_back_as_it_was(array):
    text = json.dumps(write_tensor("X", array), allow_nan=False)
    again = read_tensor(json.loads(text))
    assert again.shape == array.shape and again.tobytes() == array.tobytes()


@given(st.lists(st.binary(max_size=9), max_size=5))
def test_texts_in_binary_are_those_of_tritonclient(texts):
    array = np.array([*texts, None], dtype=np.object_)[:-1]
    raw = v2.to_bytes(array)
    theirs = serialize_byte_tensor(array)
    assert raw == (theirs.item() if theirs.size else b"")
    assert v2.from_bytes(raw, "BYTES", (len(texts),)).tolist() == texts


def test_nested_lists_are_flattened_in_order():
    nested = entry(data=[[1, 2], [3, 4]])
    assert read_tensor(nested).tolist() == [[1, 2], [3, 4]]
    assert read_tensor(entry(data=[1, [2, [3]], 4])).tolist() == [[1, 2], [3, 4]]


def test_texts_are_bytes():
    array = read_tensor(entry(datatype="BYTES", shape=[2], data=["ä", ""]))
    assert array.tolist() == ["ä".encode(), b""]
    assert write_tensor("X", array)["data"] == ["ä", ""]


def test_large_whole_numbers_are_not_rounded():
    data = [2**63 - 1, -(2**63)]
    array = read_tensor(entry(datatype="INT64", shape=[2], data=data))
    assert array.tolist() == data
    assert write_tensor("X", array)["data"] == data


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"datatype": "FLOAT"}, "'FLOAT' is none of BOOL"),
        ({"datatype": None}, "None is none of BOOL"),
        ({"datatype": "FP16"}, "FP16 cannot be sent as JSON"),
        ({"shape": None}, "the shape is missing"),
        ({"shape": [-1, 2]}, "holds -1"),
        ({"shape": [True]}, "holds True"),
        ({"shape": [1 << 20, 1 << 20]}, "too many elements"),
        ({"data": None}, "data is no list"),
        ({"data": [1, 2, 3]}, "data has 3 elements, and the shape [2, 2] asks for 4"),
        ({"data": [1, 2, 3, "4"]}, "'4', which is no FP32"),
        ({"data": [1, 2, 3, True]}, "True, which is no FP32"),
        ({"data": [1, 2, 3, None]}, "None, which is no FP32"),
        ({"datatype": "INT32", "data": [1, 2, 3, 4.0]}, "4.0, which is no INT32"),
        ({"datatype": "INT8", "data": [1, 2, 3, 400]}, "INT8"),
        ({"datatype": "UINT8", "data": [1, 2, 3, -1]}, "UINT8"),
        ({"datatype": "BOOL", "data": [1, 0, 1, 0]}, "which is no BOOL"),
        ({"datatype": "BYTES"}, "which is no BYTES"),
    ],
)
def test_tensors_that_are_none(changes, told):
    with pytest.raises(ValueError) as error:
        read_tensor(entry(**changes))
    assert told in str(error.value)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(2, np.float16),
        np.array([1.0, np.nan], np.float32),
        np.array([np.inf], np.float64),
        np.array([b"\xff"], np.object_),
        np.zeros(2, np.complex64),
    ],
)
def test_what_json_cannot_carry_is_refused(array):
    with pytest.raises(ValueError):
        write_tensor("X", array)


@pytest.mark.parametrize(
    ("raw", "datatype", "shape", "told"),
    [
        (b"1234567", "FP32", (2,), "7 bytes"),
        (b"\x01\0\0\0", "BYTES", (1,), "cut off"),
        (b"\x01\0", "BYTES", (1,), "length is cut off"),
        (b"\0\0\0\0", "BYTES", (2,), "1 texts"),
        (b"", "WORD", (0,), "none of"),
    ],
)
def test_bytes_that_do_not_fit(raw, datatype, shape, told):
    with pytest.raises(ValueError, match=told):
        v2.from_bytes(raw, datatype, shape)


# Requests ----------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [True, False])
def test_what_the_real_client_writes_is_read(binary):
    x = triton.InferInput("X", [2, 2], "FP32")
    x.set_data_from_numpy(np.arange(4, dtype=np.float32).reshape(2, 2), binary)
    t = triton.InferInput("T", [2], "BYTES")
    t.set_data_from_numpy(np.array([b"a", b"bc"], dtype=np.object_), binary)
    asked = [triton.InferRequestedOutput("Y", binary_data=binary)]
    body, length = triton.InferenceServerClient.generate_request_body(
        [x, t], outputs=asked, request_id="seven"
    )
    request = parse_infer_request(body, length)
    assert request.id == "seven"
    assert request.inputs["X"].tolist() == [[0, 1], [2, 3]]
    assert request.inputs["T"].tolist() == [b"a", b"bc"]
    assert request.outputs == ("Y",)
    assert request.binary == (frozenset({"Y"}) if binary else frozenset())


def test_without_outputs_the_client_wants_all_in_binary():
    x = triton.InferInput("X", [1], "FP32")
    x.set_data_from_numpy(np.ones(1, np.float32))
    body, length = triton.InferenceServerClient.generate_request_body([x])
    assert parse_infer_request(body, length).binary is None


@pytest.mark.parametrize(
    ("body", "length", "told"),
    [
        (b"", None, "no JSON"),
        (b"{oops", None, "no JSON"),
        (b"\xff", None, "no JSON"),
        (b"[" * 100_000, None, "no JSON"),
        (b"[]", None, "no list of inputs"),
        (b'{"inputs": 3}', None, "no list of inputs"),
        (b'{"inputs": [3]}', None, "an input has no name"),
        (b'{"inputs": [{"name": 3}]}', None, "an input has no name"),
        (b'{"inputs": [], "id": 3}', None, "id is 3"),
        (b'{"inputs": []}', 99, "Inference-Header-Content-Length is 99"),
        (b'{"inputs": []}more', 14, "4 bytes at the end"),
        (b'{"inputs": [], "outputs": 3}', None, "outputs is no list"),
        (b'{"inputs": [], "outputs": [{}]}', None, "an output has no name"),
        (b'{"inputs": [], "parameters": 3}', None, "parameters is no object"),
    ],
)
def test_requests_that_are_none(body, length, told):
    with pytest.raises(Refused) as error:
        parse_infer_request(body, length)
    assert told in str(error.value) and error.value.status == 400


@pytest.mark.parametrize("size", [-1, 5, "4", True])
def test_a_binary_size_that_does_not_fit(size):
    tensor = {"name": "X", "datatype": "FP32", "shape": [1]}
    tensor["parameters"] = {"binary_data_size": size}
    head = json.dumps({"inputs": [tensor]}).encode()
    with pytest.raises(Refused):
        parse_infer_request(head + b"1234", len(head))


def test_data_twice_is_refused():
    tensor = entry(parameters={"binary_data_size": 0})
    head = json.dumps({"inputs": [tensor]}).encode()
    with pytest.raises(Refused, match="one of them"):
        parse_infer_request(head, len(head))


CONFIG = ModelConfig(
    "m",
    "python",
    4,
    (TensorConfig("X", "TYPE_FP32", (3,)), TensorConfig("T", "TYPE_STRING", (-1,))),
    (TensorConfig("Y", "TYPE_FP32", (1,)),),
)


def inputs(**changes):
    good = {
        "X": np.zeros((2, 3), np.float32),
        "T": np.array([[b"a"], [b"b"]], np.object_),
    }
    return {k: v for k, v in {**good, **changes}.items() if v is not None}


def test_a_request_says_how_many_inferences_it_holds():
    assert check_inputs(CONFIG, InferRequest(inputs())) == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"Z": np.zeros(1)}, "unexpected inference input 'Z'"),
        ({"X": None}, "is missing the inputs ['X']"),
        ({"X": np.zeros((2, 3))}, "is FP64, and 'm' expects FP32"),
        ({"X": np.zeros((2, 4), np.float32)}, "expected [-1, 3], got [2, 4]"),
        ({"X": np.zeros(3, np.float32)}, "expected [-1, 3], got [3]"),
        ({"X": np.zeros((1, 3), np.float32)}, "inputs differ in their batch: [1, 2]"),
        (
            {
                "X": np.zeros((5, 3), np.float32),
                "T": np.zeros((5, 1)).astype(np.object_),
            },
            "the batch is 5, and must be 1 … 4",
        ),
        (
            {
                "X": np.zeros((0, 3), np.float32),
                "T": np.zeros((0, 1)).astype(np.object_),
            },
            "the batch is 0",
        ),
    ],
)
def test_requests_that_do_not_fit_the_model(changes, told):
    with pytest.raises(Refused) as error:
        check_inputs(CONFIG, InferRequest(inputs(**changes)))
    assert told in str(error.value)


def test_an_output_that_the_model_has_not():
    with pytest.raises(Refused, match="unexpected inference output 'Q'"):
        check_inputs(CONFIG, InferRequest(inputs(), ("Q",)))


@pytest.mark.parametrize("binary", [None, frozenset(), frozenset({"Y"})])
def test_the_real_client_reads_what_is_answered(binary):
    y = np.array([[0.1], [-2.0]], np.float32)
    request = InferRequest({}, ("Y",), "seven", binary)
    body, length = infer_response(CONFIG, 3, request, {"Y": y})
    result = triton.InferenceServerClient.parse_response_body(
        body, header_length=length
    )
    assert np.array_equal(result.as_numpy("Y"), y)
    told = result.get_response()
    assert (told["id"], told["model_name"], told["model_version"]) == (
        "seven",
        "m",
        "3",
    )
    assert (length is None) == (binary == frozenset())


def test_an_output_that_json_cannot_carry_is_refused():
    with pytest.raises(Refused, match="NaN or infinity"):
        infer_response(CONFIG, 1, InferRequest({}), {"Y": np.array([[np.nan]], "f4")})
