"""Where a float end begins so that the fewest tensors separate it from the rest: a least cut of the graph."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Mapping, Sequence, Set

import onnx

Vertex = Hashable
REST, END = "rest", "end"


def earlier(
    nodes: Sequence[onnx.NodeProto],
    reads: Sequence[Set[str]],
    free: Set[int],
    end: Set[int],
    constant: Set[str],
    most: int,
) -> set[int]:
    """The nodes, by their position, that belong to an end as well, so that fewer than `most` tensors separate it from
    the rest; none where that is impossible, and as few as the least number of tensors allows.

    reads: names by node.  free: the nodes that may be on either side; everything that reads one is free or in the end.
    end: those of the end, and all that reads them.  constant: tensors that both sides can have.
    """
    room: dict[Vertex, dict[Vertex, float]] = defaultdict(lambda: defaultdict(float))
    sides = [END if i in end else i if i in free else REST for i in range(len(nodes))]
    makers = {name: i for i, node in enumerate(nodes) for name in node.output if name and name not in constant}
    for i, names in enumerate(reads):
        for name in names & makers.keys():
            maker, reader = sides[makers[name]], sides[i]
            if maker != END and reader != REST:
                room[maker]["tensor", name] = 1
                room["tensor", name][reader] = room[reader][maker] = float("inf")
    count = 0
    while count < most and (way := _way(room)):
        count += 1
        for a, b in way:
            room[a][b] -= 1
            room[b][a] += 1
    if count >= most:
        return set()
    backwards: dict[Vertex, list[Vertex]] = defaultdict(list)
    for a, onward in room.items():
        for b, left in onward.items():
            if left > 0:
                backwards[b].append(a)
    found, waiting = set[Vertex]({END}), deque[Vertex]([END])
    while waiting:
        for a in backwards[waiting.popleft()]:
            if a not in found:
                found.add(a)
                waiting.append(a)
    return {i for i in free if i in found}


def _way(room: Mapping[Vertex, Mapping[Vertex, float]]) -> list[tuple[Vertex, Vertex]]:
    """The edges of a shortest way with room from the rest to the end; none where there is no way."""
    came: dict[Vertex, Vertex] = {REST: REST}
    waiting = deque[Vertex]([REST])
    while waiting and END not in came:
        a = waiting.popleft()
        for b, left in room[a].items():
            if left > 0 and b not in came:
                came[b] = a
                waiting.append(b)
    way: list[tuple[Vertex, Vertex]] = []
    at: Vertex = END if END in came else REST
    while at != REST:
        way.append((came[at], at))
        at = came[at]
    return way
