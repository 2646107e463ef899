"""Rank tables: who is who among the NPUs of a job, for HCCL, Huawei's NCCL.

A job over several servers reads one JSON file on each of them (`RANK_TABLE_FILE`):

    {"version": "1.0",
     "server_count": "2",
     "server_list": [
       {"server_id": "10.0.0.1",
        "device": [{"device_id": "0", "device_ip": "192.168.0.1", "rank_id": "0"}, …],
        "host_nic_ip": "reserve"}, …],
     "status": "completed"}

    server_id   address of the server             device_id   NPU within the server
    device_ip   address of the NPU's own network card (RoCE)
    rank_id     0, 1, 2 … through all servers, in their order

Everything is text, numbers as well. "rank table Startup" of MindSpore, and the two
tools of MindFormers, `hccl_tools.py` (one server) and `merge_hccl.py` (puts them
together, and gives new ranks in the order in which the files are named).

`problems` says what is wrong in words, before sixteen processes wait for each other.
"""

from __future__ import annotations

import ipaddress
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

Table = dict[str, Any]

GROUP = 4  # NPUs of an Ascend 910 server that links join to one group


def make(servers: Sequence[tuple[str, Sequence[str]]]) -> Table:
    """The table of servers, each an address and the addresses of its NPUs in order.

    Raises:
        ValueError: what `problems` finds in it.
    """
    listed = []
    rank = 0
    for server_id, device_ips in servers:
        devices = []
        for device_id, device_ip in enumerate(device_ips):
            devices.append(
                {
                    "device_id": str(device_id),
                    "device_ip": device_ip,
                    "rank_id": str(rank),
                }
            )
            rank += 1
        listed.append(
            {"server_id": server_id, "device": devices, "host_nic_ip": "reserve"}
        )
    table = {
        "version": "1.0",
        "server_count": str(len(listed)),
        "server_list": listed,
        "status": "completed",
    }
    check(table)
    return table


def merge(tables: Sequence[Table]) -> Table:
    """One table of several, with new ranks in the order of the tables."""
    servers = [server for table in tables for server in table["server_list"]]
    return make(
        [
            (server["server_id"], [each["device_ip"] for each in server["device"]])
            for server in servers
        ]
    )


def text(table: Table) -> str:
    """The file."""
    return json.dumps(table, indent=4)


def read(file: str) -> Table:
    """The table of a file's text.

    Raises:
        ValueError: it is no JSON, or `problems` finds something.
    """
    try:
        table = json.loads(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"file is not JSON: {error}") from error
    check(table)
    return table


def check(table: Table) -> None:
    """Nothing, if a job can start with it.

    Raises:
        ValueError: all that is wrong.
    """
    found = problems(table)
    if found:
        raise ValueError("the rank table is wrong: " + "; ".join(found))


def problems(table: object) -> list[str]:
    """All that is wrong with a table, in words; [] if nothing is."""
    if not isinstance(table, dict):
        return [f"a table is an object with fields, not a {type(table).__name__}"]
    found = []
    for name, wanted in (("version", "1.0"), ("status", "completed")):
        if table.get(name) != wanted:
            found.append(f"{name} is {table.get(name)!r}, not {wanted!r}")
    servers = table.get("server_list")
    if not isinstance(servers, list) or not servers:
        return [*found, "server_list has no servers"]
    if table.get("server_count") != str(len(servers)):
        found.append(
            f"server_count is {table.get('server_count')!r}, but there are"
            f" {len(servers)} servers: it must be {str(len(servers))!r}"
        )
    for place, server in enumerate(servers):
        found += _server_problems(server, f"server {place}")
    devices = _devices(servers)
    found += _repeated("server_id", [_of(server, "server_id") for server in servers])
    found += _repeated("device_ip", [_of(each, "device_ip") for each in devices])
    return found + _rank_problems([_of(each, "rank_id") for each in devices])


def _of(entry: object, name: str) -> object:
    return entry.get(name) if isinstance(entry, dict) else None


def _devices(servers: list) -> list:
    found = []
    for server in servers:
        devices = _of(server, "device")
        found += devices if isinstance(devices, list) else []
    return found


def _repeated(name: str, values: list) -> list[str]:
    counts = Counter(value for value in values if isinstance(value, str))
    return [
        f"{name} {value} appears {count} times"
        for value, count in counts.items()
        if count > 1
    ]


def _server_problems(server: object, where: str) -> list[str]:
    """Those of one server by itself."""
    found = []
    if not isinstance(_of(server, "server_id"), str) or not _of(server, "server_id"):
        found.append(f"{where} has no server_id")
    devices = _of(server, "device")
    if not isinstance(devices, list) or not devices:
        return [*found, f"{where} has no device"]
    numbers = []
    for place, device in enumerate(devices):
        here = f"{where}, device {place}"
        found += _address_problems(_of(device, "device_ip"), here)
        number, wrong = _number(_of(device, "device_id"), "device_id", here)
        found += wrong
        if number is not None:
            numbers.append(number)
    twice = [str(number) for number, count in Counter(numbers).items() if count > 1]
    found += [f"{where} has device_id {number} twice" for number in twice]
    return found + _group_problems(sorted(set(numbers)), where)


def _group_problems(numbers: list[int], where: str) -> list[str]:
    """NPUs 0 to 3 and 4 to 7 are groups: a job takes a part of one, or all of both."""
    groups = {number // GROUP for number in numbers}
    if len(groups) > 1 and len(numbers) != GROUP * len(groups):
        return [
            f"{where} takes NPUs {', '.join(map(str, numbers))}: of two groups of"
            f" {GROUP} it must take all"
        ]
    return []


def _address_problems(value: object, here: str) -> list[str]:
    if not value:
        return [f"{here} has no device_ip"]
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return [f"{here}: device_ip {value!r} is no address"]
    return []


def _number(value: object, name: str, here: str) -> tuple[int | None, list[str]]:
    """(the number, what is wrong with it)."""
    if value is None:
        return None, [f"{here} has no {name}"]
    if not isinstance(value, str) or not value.isdecimal():
        return None, [f"{here}: {name} {value!r} must be a number as text"]
    return int(value), []


def _rank_problems(ranks: list) -> list[str]:
    """Ranks are 0 to n − 1, each once, in the order of the servers."""
    found, numbers = [], []
    for place, rank in enumerate(ranks):
        number, wrong = _number(rank, "rank_id", f"NPU {place} of the table")
        found += wrong
        if number is not None:
            numbers.append(number)
    counts = Counter(numbers)
    found += [f"rank_id {r} appears {c} times" for r, c in counts.items() if c > 1]
    wanted = set(range(len(ranks)))
    missing = sorted(wanted - set(numbers))
    if missing and len(numbers) == len(ranks):
        listed = ", ".join(map(str, missing))
        found.append(f"ranks go from 0 to {len(ranks) - 1}, but {listed} is missing")
    elif not found and numbers != sorted(numbers):
        found.append("ranks do not rise through the servers in their order")
    return found
