"""Decisions of a forward pass on sizes and types: the answer of the example, kept in the graph with a check."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx


def decided(value: Any, answer: Any, asked: str) -> None:
    """Check that a block is used as it was traced. ValueError: the example gave another answer than this batch."""
    if isinstance(value, fx.Proxy):  # in a block that is cut again
        value.tracer.create_proxy("call_function", decided, (value, answer, asked), {})
        return
    if isinstance(value, Tensor):
        value, answer = (value.shape, value.dtype), (answer.shape, answer.dtype)
    if isinstance(answer, bool):
        same = answer if value else not answer  # a branch, which torch.compile may take too
    else:
        same = (type(answer)(value) if isinstance(answer, int | float) else value) == answer
    if not same:
        raise ValueError(
            f"the forward pass was traced with {asked} = {answer}, as for example=, and a block cannot follow another "
            f"course, but this batch has {value}: build the learner with such a batch, or use bll.Hooked"
        )


def describe(node: fx.Node, *, depth: int = 3) -> str:
    """The expression of a node, as in the code that it was recorded from; of deeper ones the name in the graph."""

    def of(value: Any) -> str:
        return describe(value, depth=depth - 1) if isinstance(value, fx.Node) else repr(value)

    if node.op in ("placeholder", "get_attr"):
        return str(node.target)
    if node.op == "call_module":
        return f"{node.target}(...)"
    if not depth:
        return node.name
    if node.op == "call_method":
        return f"{of(node.args[0])}.{node.target}({', '.join(map(of, node.args[1:]))})"
    if node.target is getattr:
        return f"{of(node.args[0])}.{node.args[1]}"
    if node.target is operator.getitem:
        return f"{of(node.args[0])}[{of(node.args[1])}]"
    return f"{getattr(node.target, '__name__', node.target)}({', '.join(map(of, node.args))})"
