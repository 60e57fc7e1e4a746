"""Clusters from TOML files.

Keys are the attributes of `Cluster`; what is not there is as it is by default.
Numbers are in bytes and in one unit of time: seconds, where the command line reads
the file. Two nodes of four devices, one of them slow, with one card a node::

    devices_per_node = 4
    within_node = { latency = 5.7e-6, bandwidth = 32e9 }
    link_latency = 14e-6          # between nodes
    nic_bandwidth = 12.5e9
    memory = 24e9
    buffering = "rendezvous"

    [speeds]
    3 = 0.9

    [[links]]
    source = 0
    target = 1
    bandwidth = 16e9
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from os import PathLike, fspath
from typing import Any

from pipeproof.sched.errors import ParameterError, ParseError
from pipeproof.sched.exact import is_number
from pipeproof.sim.cluster import Cluster, Link
from pipeproof.sim.toml import parsed, read


def load(path: str | PathLike[str]) -> Cluster:
    """A cluster from a TOML file.

    Raises:
        ParseError: naming the file, the key, what was expected and found.
        OSError: the file cannot be read.
    """
    found = read(path, "a cluster")
    try:
        return _cluster(found)
    except ParseError as error:
        raise ParseError(f"{fspath(path)}: {error}") from None


def parse(text: str) -> Cluster:
    """A cluster from the text of a TOML file.

    Raises:
        ParseError: naming the key, what was expected and found.
    """
    return _cluster(parsed(text))


def _cluster(found: Mapping[str, Any]) -> Cluster:
    _known("", found, READERS)
    given = {key: READERS[key](key, value) for key, value in found.items()}
    try:
        return Cluster(**given)
    except ParameterError as error:
        raise ParseError(str(error)) from None


def _known(where: str, found: Mapping[str, Any], known: Mapping[str, object]) -> None:
    for key in found:
        if key not in known:
            raise ParseError(
                f"{where}{_shown(key)}: expected a key of {', '.join(known)}; leave "
                "this one out, or correct its name"
            )


def _shown(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable() and value
    text = value if plain else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _wrong(key: str, expected: str, value: Any) -> ParseError:
    kind = "text" if isinstance(value, str) else type(value).__name__
    return ParseError(f"{key}: expected {expected}, found {kind} {_shown(value)}")


def _number(key: str, value: Any) -> Any:
    if not is_number(value):
        raise _wrong(key, "a number", value)
    return value


def _integer(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(key, "an integer", value)
    return value


def _truth(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, "true or false", value)
    return value


def _word(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(key, "text in quotes", value)
    return value


def _buffering(key: str, value: Any) -> str | int:
    return _word(key, value) if isinstance(value, str) else _integer(key, value)


def _table(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(key, "a table", value)
    return value


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(key, "a list", value)
    return value


def _nodes(key: str, value: Any) -> list[int]:
    return [_integer(f"{key}[{i}]", one) for i, one in enumerate(_list(key, value))]


def _speeds(key: str, value: Any) -> dict[int, Any]:
    result = {}
    for name, speed in _table(key, value).items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,8}", name, re.ASCII):
            raise ParseError(
                f"{key}: expected numbers of devices as keys, such as 3 = 0.5; found "
                f"{_shown(name)}"
            )
        result[int(name)] = _number(f"{key}.{name}", speed)
    return result


OF_LINK: dict[str, Callable[[str, Any], Any]] = {
    "latency": _number,
    "bandwidth": _number,
}
OF_PAIR = {"source": _integer, "target": _integer, **OF_LINK}


def _link(key: str, value: Any) -> Link:
    found = _table(key, value)
    _known(f"{key}.", found, OF_LINK)
    given = {name: OF_LINK[name](f"{key}.{name}", one) for name, one in found.items()}
    try:
        return Link(**given)
    except ParameterError as error:
        raise ParseError(f"{key}: {error}") from None


def _links(key: str, value: Any) -> dict[tuple[int, int], Link]:
    result: dict[tuple[int, int], Link] = {}
    for place, one in enumerate(_list(key, value)):
        where = f"{key}[{place}]"
        found = dict(_table(where, one))
        _known(f"{where}.", found, OF_PAIR)
        pair = []
        for end in ("source", "target"):
            if end not in found:
                raise ParseError(f"{where}: expected source and target, found no {end}")
            pair.append(_integer(f"{where}.{end}", found.pop(end)))
        source, target = pair
        if min(pair) < 0 or source == target:
            raise ParseError(
                f"{where}: expected two different devices, numbered from 0; found "
                f"{source} and {target}"
            )
        if (source, target) in result:
            raise ParseError(
                f"{where}: expected each pair once; {source} to {target} is there "
                "already"
            )
        result[source, target] = _link(where, found)
    return result


READERS: dict[str, Callable[[str, Any], Any]] = {
    "link_latency": _number,
    "link_bandwidth": _number,
    "links": _links,
    "buffering": _buffering,
    "host_bandwidth": _number,
    "shared_processor": _truth,
    "streams": _word,
    "speeds": _speeds,
    "memory": _number,
    "devices_per_node": _integer,
    "node_of": _nodes,
    "within_node": _link,
    "nic_bandwidth": _number,
    "devices_per_nic": _integer,
    "node_host_bandwidth": _number,
    "host_memory": _number,
}
"""How the value of each key is read."""
