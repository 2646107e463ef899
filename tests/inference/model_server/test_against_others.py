"""The same repository, the same requests: the real Triton, MLServer, and our server.

What the others answered is stored (scripts/golden/model_server_goldens.py). The tests
marked `peer` start the real Triton and ask it again; they are the stage `peers` of
scripts/verify.py. Only the making of its environment may be skipped, with the reason.
"""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest
import tritonclient.http as triton

from llmlab.course import peers
from llmlab.inference import model_server as ms
from llmlab.inference.model_server import load
from tests.inference.model_server import asking
from tests.inference.model_server.asking import BURSTS, REQUESTS, ask, burst

GOLDEN = json.loads(asking.GOLDEN.read_text(encoding="utf-8"))
STORED = GOLDEN["triton"]["answers"]
# Triton's status → ours, with the reason.
OTHERWISE = {
    # Triton says 500, "the server failed", for what it cannot parse; the client erred
    **dict.fromkeys(
        (
            "no JSON",
            "no inputs",
            "too few numbers",
            "too many numbers",
            "texts for numbers",
            "true for numbers",
            "null for numbers",
            "a negative shape",
            "no name",
            "no shape",
            "an id that is no text",
        ),
        (500, 400),
    ),
    # Triton writes Infinity, which is no JSON
    "an overflow": (200, 400),
}
# What Triton's answers hold besides
ITS_OWN = {"parameters"}


def same(ours, theirs):
    """Equal, floats to within a few roundings of fp32."""
    if isinstance(theirs, dict):
        theirs = {k: v for k, v in theirs.items() if k not in ITS_OWN}
        return ours.keys() == theirs.keys() and all(
            same(ours[k], theirs[k]) for k in theirs
        )
    if isinstance(theirs, list):
        if theirs and isinstance(theirs[0], dict) and "datatype" in theirs[0]:
            # Triton's ensembles give outputs in an order that is not the config's
            ours = sorted(ours, key=lambda tensor: tensor["name"])
            theirs = sorted(theirs, key=lambda tensor: tensor["name"])
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, float):
        return ours == pytest.approx(theirs, abs=1e-4)
    return ours == theirs and type(ours) is type(theirs)


def compare_answers(name, theirs, ours):
    (their_status, their_answer), (our_status, our_answer) = theirs, ours
    if name in OTHERWISE:
        assert (their_status, our_status) == OTHERWISE[name]
    else:
        assert our_status == their_status
    if our_status != 200:
        assert set(our_answer) == {"error"}
    elif name == "the repository":
        assert {m["name"] for m in our_answer} == {m["name"] for m in their_answer}
        assert {m["state"] for m in our_answer} == {"READY"}
    elif their_status == 200:
        assert same(our_answer, their_answer)


@pytest.mark.parametrize("name", REQUESTS)
def test_answers_are_those_that_triton_gave(ours, name):
    compare_answers(name, STORED[name], ask(ours.url, *REQUESTS[name]))


def test_the_python_model_was_told_the_same(ours):
    told = ask(ours.url, *REQUESTS["all types"])[1]["outputs"][-1]["data"]
    assert told == STORED["all types"][1]["outputs"][-1]["data"]


@pytest.mark.parametrize("name", BURSTS)
def test_bursts_come_to_the_batches_that_triton_made(ours, name):
    model, rows, gap = BURSTS[name]
    found = burst(ours.url, model, rows, gap)
    stored = GOLDEN["triton"]["bursts"][name]
    assert (found["sizes"], found["refused"]) == (stored["sizes"], stored["refused"])


@pytest.mark.parametrize("name", GOLDEN["triton"]["configs"])
def test_configurations_are_a_part_of_tritons(ours, name):
    config = ask(ours.url, "GET", f"/v2/models/{name}/config", None)[1]
    assert_within(config, GOLDEN["triton"]["configs"][name], name)


def assert_within(ours, theirs, where):
    """All that ours says is said by theirs; paths of this machine aside."""
    if isinstance(ours, dict):
        for key, value in ours.items():
            assert key in theirs, f"{where}.{key}"
            assert_within(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for a, b in zip(ours, theirs, strict=True):
            assert_within(a, b, where)
    elif not where.endswith("folder.string_value"):
        assert ours == theirs, where


def test_statistics_have_tritons_names(ours):
    load.closed(ours.url, "lesson", 1, 1)
    stats = load.statistics(ours.url, "lesson")
    theirs = GOLDEN["triton"]["statistics"]

    def check(ours, theirs):
        if isinstance(ours, dict):
            for key in ours:
                check(ours[key], theirs[key])
        elif isinstance(ours, list):
            check(ours[0], theirs[0])
        else:
            assert type(ours).__name__ == theirs

    check(stats, theirs)
    left = theirs.keys() - stats.keys()
    assert left == {"memory_usage", "response_stats"}
    left = theirs["inference_stats"].keys() - stats["inference_stats"].keys()
    assert left == {"cache_hit", "cache_miss"}


def test_metrics_have_tritons_names(ours):
    with urllib.request.urlopen(f"http://{ours.url}/metrics") as answer:
        page = answer.read().decode()
    names = {line.split("{")[0] for line in page.splitlines() if "{" in line}
    assert names == set(GOLDEN["triton"]["metrics"])
    for line in GOLDEN["triton"]["metrics_of_one"]:
        assert line.rsplit(" ", 1)[0] in page


# MLServer, a second one of the same protocol ------------------------------------------

MLSERVER = GOLDEN["mlserver"]["answers"]
AGREED = [name for name, (status, _) in MLSERVER.items() if status == 200]
# MLServer does not hold a request to the model's configuration: datatype, shape, names
# and the largest batch are for the model to look at. We refuse these, as Triton does.
NOT_LOOKED_AT = {
    "a batch too large",
    "a negative shape",
    "an empty batch",
    "an input too many",
    "an input twice",
    "an unknown output",
    "another datatype",
    "another input",
    "no batch dimension",
    "null for numbers",
    "texts for numbers",
    "true for numbers",
    "wrong dims",
}


def test_mlserver_was_asked_enough():
    assert len(MLSERVER) > 25 and len(AGREED) > 8


@pytest.mark.parametrize("name", AGREED)
def test_what_mlserver_answered_we_answer(ours, name):
    """Outputs alike; names of the server and its own parameters aside."""
    status, answer = ask(ours.url, *REQUESTS[name])
    if name in NOT_LOOKED_AT:
        assert status == 400
        return
    assert status == 200
    theirs = MLSERVER[name][1]
    if isinstance(theirs, dict) and "outputs" in theirs:
        for a, b in zip(answer["outputs"], theirs["outputs"], strict=True):
            for key in ("name", "datatype", "shape", "data"):
                assert same(a.get(key), b.get(key)), key


# The real Triton, now ----------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    try:
        python = peers.make("triton", quiet=True)
    except peers.PeerError as reason:
        pytest.skip(f"the real Triton cannot be had here: {reason}")
    folder = tmp_path_factory.mktemp("triton") / "models"
    with ms.TritonServer(python, asking.write_repository(folder)) as server:
        yield server


@pytest.mark.peer
@pytest.mark.parametrize("name", REQUESTS)
def test_triton_still_answers_as_stored_and_as_we_do(theirs, ours, name):
    now = ask(theirs.url, *REQUESTS[name])
    assert now[0] == STORED[name][0]
    compare_answers(name, now, ask(ours.url, *REQUESTS[name]))


@pytest.mark.peer
@pytest.mark.parametrize("name", BURSTS)
def test_triton_still_makes_these_batches(theirs, name):
    model, rows, gap = BURSTS[name]
    burst(theirs.url, model, [1], 0)  # the first one is slow
    found = burst(theirs.url, model, rows, gap)
    stored = GOLDEN["triton"]["bursts"][name]
    assert (found["sizes"], found["refused"]) == (stored["sizes"], stored["refused"])


@pytest.mark.peer
def test_its_own_client_gets_the_same_from_both(theirs, ours):
    text = triton.InferInput("TEXT", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"My fellow citizens,"], np.object_))
    found = []
    for server in (theirs, ours):
        with triton.InferenceServerClient(server.url) as client:
            got = client.infer("complete", [text])
            found.append((got.as_numpy("WORD")[0, 0], got.as_numpy("LOGPROB").item()))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-4)


@pytest.mark.peer
def test_a_lone_client_waits_and_sixteen_share(theirs, ours):
    for server in (theirs, ours):
        load.closed(server.url, "lesson", 2, 2)
        first = load.statistics(server.url, "lesson")
        load.closed(server.url, "lesson", 1, 10)
        lone = load.statistics(server.url, "lesson")
        load.closed(server.url, "lesson", 16, 8)
        many = load.statistics(server.url, "lesson")
        assert load.executions(first, lone) == {1: 10}
        assert load.queued(first, lone) >= 0.0195
        sizes = load.executions(lone, many)
        assert sum(size * count for size, count in sizes.items()) == 128
        assert 8 <= sum(sizes.values()) <= 40
        assert load.queued(lone, many) < load.queued(first, lone)
