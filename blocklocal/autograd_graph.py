"""What a tensor's autograd graph reaches: parameters, and values that pass a border beside the features."""

from __future__ import annotations

from collections.abc import Container, Iterator, Set
from typing import Any

from torch import Tensor, nn

Node = Any
"""A node of the autograd graph, of which torch has no public type that knows `variable`."""


def reachable(root: Node, *, but: Container[Node] = ()) -> set[Node]:
    """The nodes from which `root` was computed, itself included, none beyond those that it is not to enter."""
    found, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in found or node in but:
            continue
        found.add(node)
        waiting += [following for following, _ in node.next_functions]
    return found


def parameters(nodes: Set[Node], *, names: dict[nn.Parameter, str]) -> list[str]:
    """The names of the parameters among them."""
    found = {names[node.variable] for node in nodes if getattr(node, "variable", None) in names}
    return [name for name in names.values() if name in found]


def shared(later: Tensor, earlier: Set[Node]) -> Iterator[Node]:
    """The nodes of earlier blocks' graphs from which `later` was computed, although their features were detached."""
    found, waiting = set(), [later.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if node in earlier:
            yield node
        else:
            waiting += [following for following, _ in node.next_functions]
