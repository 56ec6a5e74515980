"""A head that looks through a copy of the unit after its border, as in Momentum Auxiliary Networks.

The block then learns features that the next unit can use, not only ones that a shallow head can read, at the cost of
one more unit per step (Su et al., 2024). Nothing flows back: the copy is part of the border, and the unit that it is
refreshed from does not change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from blocklocal.arguments import require, require_whole
from blocklocal.candidates import candidates, places
from blocklocal.graph import mode
from blocklocal.heads import Head
from blocklocal.internals import version_of
from blocklocal.losses import Predictive
from blocklocal.messages import BorderInput, BorderSpec
from blocklocal.refreshed_head import RefreshedHead
from blocklocal.shape_probe import drops_in_place
from blocklocal.split import cut


@dataclass(frozen=True)
class Lookahead:
    """A head for `Predictive(head=...)`: a copy of the next unit, followed by another head.

    head: as for `Predictive`; by default the one for the output of the copy. refresh: number of training steps after
    which the copy takes the unit's current weights and statistics; in between it is frozen. With refresh=1 the two
    blocks overlap. None: the copy is taken once, and learns with the block. trainable: in addition to the frozen copy a
    second one learns, and the head sees their mean. The unit is the shortest part of the next block that can be cut
    off, or all of it.

    Over processes, `bll.Pipeline(..., lookahead=True)` fetches the copies from the rank of the next block.

    >>> import blocklocal as bll
    >>> loss = bll.Predictive(bll.Lookahead(refresh=100))
    """

    head: str | Head | None = None
    refresh: int | None = 100
    trainable: bool = False

    def __post_init__(self) -> None:
        Predictive(self.head)  # refuses an invalid head
        if self.refresh is not None:
            require_whole(self.refresh, name="refresh", least=1)
        require(self.trainable, bool, name="trainable", needed="pass True or False")

    def __call__(self, spec: BorderSpec) -> nn.Module:
        """ValueError: the next unit's output differs in layout from its input, or has one number per channel."""
        if spec.following is None:  # during the search for cuts
            return self._inner(spec)
        weight = next(spec.following.parameters(), None)
        if weight is None:
            raise ValueError("Lookahead() copies a unit with weights, but the next block has none: use another head")
        example, shapes = torch.zeros(2, *spec.shape, device=weight.device, dtype=weight.dtype), []
        for unit in _units(spec.following):
            output, writes = _output(unit, example)
            shapes.append(tuple(output.shape))
            if output.dim() == example.dim() and (output[0, 0].numel() > 1 or example[0, 0].numel() == 1):
                break
        else:
            raise ValueError(
                f"Lookahead() looks through a unit that keeps the layout, but the next one turns "
                f"{tuple(example.shape)} into {shapes[0]}: leave more of the model in the next block, or use another "
                "head"
            )
        behind = replace(spec, shape=tuple(output.shape[1:]), following=None)
        inner = self._inner(behind)
        head = LookaheadHead(unit, spec.following, inner, spec=replace(behind, output_layer=None), settings=self)
        head.writes_input = writes
        return head

    def _inner(self, spec: BorderSpec) -> nn.Module:
        return Predictive(self.head).build(spec).head


class LookaheadHead(RefreshedHead):
    """The copies, frozen or learning, and the head behind them.

    elsewhere: the next block learns in another process, and `deliver` provides what a refresh takes.
    """

    settings = "Lookahead()"

    def __init__(
        self, unit: nn.Module, block: nn.Module, head: nn.Module, *, spec: BorderSpec, settings: Lookahead
    ) -> None:
        super().__init__(refresh=settings.refresh)
        self.head, self.spec = head, spec
        self._next = unit, block  # in a tuple, since they are not part of this border
        frozen = settings.refresh is not None
        self.frozen = copy.deepcopy(unit).requires_grad_(False) if frozen else None
        self.trained = copy.deepcopy(unit) if settings.trainable or not frozen else None
        self.writes_input = False  # True for a unit that begins with an in-place activation
        self.elsewhere = False
        self._delivered: Sequence[Tensor] | None = None

    def forward(self, border_input: BorderInput) -> Tensor:
        seen = [through(border_input.h.clone() if self.writes_input else border_input.h) for through in self.copies]
        behind = BorderInput(
            seen[0] if len(seen) == 1 else (seen[0] + seen[1]) / 2,
            spec=self.spec,
            statistic=border_input.statistic,
            feedback=None,
        )
        return self.head(behind)

    def source(self) -> list[Tensor]:
        """The weights and statistics of the next unit, in the same order as those of a copy."""
        unit, block = self._next
        if not set(unit.parameters()) <= set(block.parameters()):
            raise RuntimeError(
                "the next block's parameters were replaced after its unit was copied: build a new learner"
            )
        return list(_tensors(unit))

    def deliver(self, tensors: Sequence[Tensor]) -> None:
        """Provide the tensors for the coming refresh: what `source` returns where the next block learns."""
        self._delivered = tensors

    def own(self) -> list[Tensor]:
        """The weights and statistics of a copy."""
        return list(_tensors(self.copies[0]))

    @torch.no_grad()
    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Take all copies again, from what `source` returns."""
        for made in self.copies:
            _fill(made, tensors)

    @property
    def copies(self) -> list[nn.Module]:
        return [made for made in (self.frozen, self.trained) if made is not None]

    def take(self, model: nn.Module) -> None:
        assert self.frozen is not None
        if self.elsewhere and self._delivered is None:
            raise RuntimeError("the next block learns in another process: train with the pipeline, which sends copies")
        tensors, self._delivered = self.source() if self._delivered is None else self._delivered, None
        _fill(self.frozen, tensors)


def _units(block: nn.Module) -> Iterator[nn.Module]:
    """The shortest part of a block that can be cut off, or all of it; then shorter ones, down to the last weights.

    The shorter ones leave out layers without weights at the end, such as pooling.
    """
    names, useful = places(block), candidates(block)
    end = names.index(useful[0]) + 1 if useful else len(names)
    if not useful:
        yield block
    for name in reversed(names[:end]):
        unit = cut(block, at=[name])[0]
        if any(True for _ in unit.parameters()):
            yield unit


@torch.no_grad()
def _output(unit: nn.Module, example: Tensor) -> tuple[Tensor, bool]:
    """The unit's output for the example, and whether it writes into its input, or would in training mode."""
    given = example.clone()
    before = version_of(given)
    with mode(unit, training=False):
        output = unit(given)
    return output, version_of(given) != before or drops_in_place(unit)


def lookaheads(module: nn.Module) -> list[LookaheadHead]:
    """The heads of a border, or of several, that look through copies."""
    return [head for head in module.modules() if isinstance(head, LookaheadHead)]


def _fill(made: nn.Module, tensors: Sequence[Tensor]) -> None:
    for own, now in zip(_tensors(made), tensors, strict=True):
        own.copy_(now)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
