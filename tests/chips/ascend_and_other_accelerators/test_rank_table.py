"""Rank tables: those of the documentation, and each way to get one wrong."""

from __future__ import annotations

import copy
import json

import pytest

from llmlab.chips.ascend_and_other_accelerators import rank_table as r


def servers(count: int, npus: int = 8):
    return [
        (f"10.0.0.{s + 1}", [f"192.168.{s}.{d + 1}" for d in range(npus)])
        for s in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("npus", [1, 4, 8])
def test_ranks_go_through_all_servers(count, npus):
    table = r.make(servers(count, npus))
    assert table["server_count"] == str(count)
    ranks = [d["rank_id"] for s in table["server_list"] for d in s["device"]]
    assert ranks == [str(n) for n in range(count * npus)]
    assert r.read(r.text(table)) == table


def test_as_the_documentation_of_mindspore_writes_it():
    """ "rank table Startup", MindSpore r2.7: two NPUs, its stars filled in."""
    table = r.make([("10.1.1.1", ["192.1.1.6", "192.2.1.6"])])
    assert table == {
        "version": "1.0",
        "server_count": "1",
        "server_list": [
            {
                "server_id": "10.1.1.1",
                "device": [
                    {"device_id": "0", "device_ip": "192.1.1.6", "rank_id": "0"},
                    {"device_id": "1", "device_ip": "192.2.1.6", "rank_id": "1"},
                ],
                "host_nic_ip": "reserve",
            }
        ],
        "status": "completed",
    }


def test_the_example_of_mindformers_would_not_work():
    """docs/model_cards/llama.md: its second server has addresses of its first."""
    first = [f"192.168.{i % 4}.{i // 4}" for i in range(8)]
    second = [f"192.168.{i % 4}.{1 + i // 4}" for i in range(8)]
    with pytest.raises(ValueError, match=r"device_ip 192\.168\.0\.1 appears 2 times"):
        r.make([("10.0.0.1", first), ("10.0.0.2", second)])


def test_merging_gives_new_ranks_in_the_order_of_the_tables():
    one, two = (r.make([server]) for server in servers(2))
    assert r.merge([one, two]) == r.make(servers(2))
    turned = r.merge([two, one])
    assert turned["server_list"][0]["server_id"] == "10.0.0.2"
    assert turned["server_list"][0]["device"][0]["rank_id"] == "0"
    assert one["server_list"][0]["device"][0]["rank_id"] == "0"  # left as it was


def device(table, server, place):
    return table["server_list"][server]["device"][place]


CHANGES = {
    "version is '1.2'": lambda t: t.update(version="1.2"),
    "status is None": lambda t: t.pop("status"),
    "server_list has no servers": lambda t: t.update(server_list=[]),
    "server_count is '1', but there are 2": lambda t: t.update(server_count="1"),
    "server_count is 2, but": lambda t: t.update(server_count=2),
    "server 1 has no server_id": lambda t: t["server_list"][1].pop("server_id"),
    "server_id 10.0.0.1 appears 2": lambda t: t["server_list"][1].update(
        server_id="10.0.0.1"
    ),
    "server 0 has no device": lambda t: t["server_list"][0].update(device=[]),
    "server 1, device 3 has no device_ip": lambda t: device(t, 1, 3).pop("device_ip"),
    "device_ip '192.168.0.xx' is no": lambda t: device(t, 0, 1).update(
        device_ip="192.168.0.xx"
    ),
    "device_ip 192.168.0.1 appears 2": lambda t: device(t, 1, 2).update(
        device_ip="192.168.0.1"
    ),
    "device 2 has no device_id": lambda t: device(t, 0, 2).pop("device_id"),
    "device_id 5 must be a number as text": lambda t: device(t, 0, 5).update(
        device_id=5
    ),
    "server 0 has device_id 1 twice": lambda t: device(t, 0, 0).update(device_id="1"),
    "rank_id 3 appears 2 times": lambda t: device(t, 1, 0).update(rank_id="3"),
    "but 8 is missing": lambda t: device(t, 1, 0).update(rank_id="16"),
    "rank_id 'a' must be a number": lambda t: device(t, 1, 0).update(rank_id="a"),
    "NPU 9 of the table has no rank_id": lambda t: device(t, 1, 1).pop("rank_id"),
    "do not rise": lambda t: (
        device(t, 0, 0).update(rank_id="1"),
        device(t, 0, 1).update(rank_id="0"),
    ),
    "of two groups of 4 it must take all": lambda t: t["server_list"][1].update(
        device=t["server_list"][1]["device"][2:6]
    ),
}


@pytest.mark.parametrize("says", CHANGES)
def test_what_is_wrong_is_named(says):
    table = copy.deepcopy(r.make(servers(2)))
    CHANGES[says](table)
    found = r.problems(table)
    assert any(says in each for each in found), found
    with pytest.raises(ValueError, match="the rank table is wrong"):
        r.check(table)


def test_one_mistake_is_one_problem():
    """Nothing follows from it that is not wrong itself."""
    table = r.make(servers(2))
    del device(table, 1, 3)["device_ip"]
    assert len(r.problems(table)) == 1
    table = r.make(servers(2))
    device(table, 1, 3)["rank_id"] = "99"
    assert len(r.problems(table)) == 1


@pytest.mark.parametrize("nonsense", [[], "1", None, {"server_list": [3]}, {}])
def test_nonsense_has_problems_and_breaks_nothing(nonsense):
    assert r.problems(nonsense)
    with pytest.raises(ValueError, match="the rank table is wrong"):
        r.read(json.dumps(nonsense))


def test_what_is_no_json():
    with pytest.raises(ValueError, match="is not JSON"):
        r.read("{")
