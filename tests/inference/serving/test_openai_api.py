"""Requests are read by a list of what is known."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.inference.serving import openai_api as api
from llmlab.inference.serving.openai_api import Answer, Asked, Refused

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**body) -> Asked:
    body = {"model": "m", "messages": HELLO} | body
    return api.read_chat(json.dumps(body).encode())


def completion(**body) -> Asked:
    body = {"model": "m", "prompt": "Hello"} | body
    return api.read_completion(json.dumps(body).encode())


def test_what_is_given_arrives():
    asked = chat(
        max_completion_tokens=5,
        temperature=0,
        top_p=0.5,
        seed=-3,
        stop=["a", "b"],
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        user="somebody",
    )
    sampling = {"temperature": 0.0, "top_p": 0.5, "seed": -3}
    want = Asked("m", HELLO, (), 5, sampling, ("a", "b"), 2, True, True)
    assert asked == want
    assert chat(max_tokens=7).most == 7
    assert chat(stop="a").stop == ("a",)


def test_null_is_as_if_it_were_not_there():
    fields = ["max_tokens", "temperature", "stop", "stream", "tools", "logprobs", "n"]
    assert chat(**dict.fromkeys(fields)) == chat()
    assert completion(suffix=None, logprobs=None, best_of=1) == completion()


def test_what_does_nothing_may_be_said():
    plain = chat()
    said = chat(
        logprobs=False,
        top_logprobs=0,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        logit_bias={},
        store=False,
        service_tier="auto",
    )
    assert said == plain


def test_messages_in_parts_are_joined_and_developers_are_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(messages=[{"role": "developer", "content": parts}])
    assert asked.messages == [{"role": "system", "content": "ab"}]


def test_an_answer_can_be_sent_back_as_it_came():
    answer = Answer("i", 0, "m", True).whole([("Hi", "stop")], {})
    message = answer["choices"][0]["message"] | {"tool_calls": None, "audio": None}
    asked = chat(messages=[*HELLO, message])
    assert asked.messages[1] == {"role": "assistant", "content": "Hi"}


def test_prompts_of_all_four_kinds():
    assert completion(prompt="a").prompts == ("a",)
    assert completion(prompt=["a", "b"]).prompts == ("a", "b")
    assert completion(prompt=[1, 2]).prompts == ([1, 2],)
    assert completion(prompt=[[1], [2, 3]]).prompts == ([1], [2, 3])
    assert completion().most == 16


REFUSED = [
    ({"temperature": 3}, "temperature", "from 0 to 2"),
    ({"temperature": "hot"}, "temperature", '"hot" is not allowed'),
    ({"temperature": True}, "temperature", "a number"),
    ({"temperature": float("nan")}, "temperature", "a number"),
    ({"temperature": 10**400}, "temperature", "a number"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_k": 0}, "top_k", "a whole number from 1"),
    ({"max_tokens": 0}, "max_tokens", "from 1"),
    ({"max_tokens": 1.5}, "max_tokens", "a whole number"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "one of them"),
    ({"n": 9}, "n", "from 1 to 8"),
    ({"seed": 2**63}, "seed", "a whole number"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ({"stop": ""}, "stop", "1 to 200"),
    ({"stop": [7]}, "stop", "a text"),
    ({"stream": 1}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "set stream"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not a field"),
    ({"logprobs": True}, "logprobs", "not supported here: leave it out, or use false"),
    ({"logprobs": 0}, "logprobs", "not supported"),  # 0 is not false
    ({"tools": [{}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"temprature": 1}, "temprature", "not a field that is known here"),
    ({"model": None}, "model", "is missing"),
    ({"model": 7}, "model", "a text"),
    ({"messages": []}, "messages", "1 to 1000"),
    ({"messages": "Hello"}, "messages", "a list"),
    ({"messages": ["Hello"]}, "messages[0]", "an object"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "one of system"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "a text"),
    ({"messages": [HELLO[0] | {"x": 1}]}, "messages[0].x", "role and content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
        "reads nothing else",
    ),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0]", "surrogate"),
]


@pytest.mark.parametrize(("body", "param", "words"), REFUSED, ids=str)
def test_what_is_wrong_is_named(body, param, words):
    with pytest.raises(Refused) as error:
        chat(**body)
    assert error.value.status == 400
    assert error.value.param.startswith(param)
    assert words in error.value.message
    said = error.value.as_data()["error"]
    assert said["type"] == "invalid_request_error" and said["code"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 2}, "n"),
        ({"prompt": None}, "prompt"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
    ],
    ids=str,
)
def test_of_a_completion_too(body, param):
    with pytest.raises(Refused) as error:
        completion(**body)
    assert error.value.param == param


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"[]", b"7", b"null", b"[" * 100_000, b"9" * 5000],
)
def test_a_body_that_is_no_object_is_refused(body):
    for read in (api.read_chat, api.read_completion):
        with pytest.raises(Refused, match=r"body"):
            read(body)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "text", "m", "stop"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage"])
            | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
BODIES = st.dictionaries(
    st.sampled_from([*api.CHAT, *api.COMPLETION]), JSON, max_size=6
)


@settings(max_examples=120, deadline=None)
@given(st.binary(max_size=40) | BODIES.map(lambda body: json.dumps(body).encode()))
def test_any_body_is_understood_or_refused(body):
    for read in (api.read_chat, api.read_completion):
        try:
            asked = read(body)
        except Refused as error:
            assert 400 <= error.status < 500
            json.dumps(error.as_data()).encode()
        else:
            assert isinstance(asked, Asked)
