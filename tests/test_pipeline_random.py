"""Random chains under random placements: the weights, losses and predictions of one process, to the bit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import processes
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

import blocklocal as bll
from blocklocal.lookahead import lookaheads
from blocklocal.messages import BorderSpec
from blocklocal.pipeline import Pipeline, Placement
from blocklocal.seeding import seeded

EXAMPLES = int(os.environ.get("BLOCKLOCAL_EXAMPLES", "12"))
CLASSES, ROWS, SEED = 3, 6, 5
LAYERS = [
    "linear",
    "conv",
    "view",
    "slice",
    "channels_last",
    "pause",
    "dropout",
    "no_dropout",
    "relu_",
    "layer_norm",
    "batch_norm",
]


@dataclass(frozen=True)
class Case:
    blocks: tuple[tuple[str, ...], ...]
    counts: tuple[int, ...]
    minibatches: int
    window: int
    prefetch: int
    accumulate: int
    clip: float
    bf16: bool
    beliefs: bool = False
    refresh: int = 0
    """Heads look through a copy of the next unit, refreshed every so many steps, where there is one; 0: none does."""

    @property
    def placement(self) -> Placement:
        """On len(counts) ranks; what the counts leave goes to the last."""
        ranks = [rank for rank, count in enumerate(self.counts) for _ in range(count)]
        return Placement((*ranks, *[len(self.counts) - 1] * (len(self.blocks) - len(ranks))))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    blocks = draw(st.lists(st.lists(st.sampled_from(LAYERS), max_size=3).map(tuple), min_size=1, max_size=5).map(tuple))
    ranks = draw(st.integers(1, min(3, len(blocks))))
    counts = [1] * ranks
    for _ in range(draw(st.integers(0, len(blocks) - ranks))):
        counts[draw(st.integers(0, ranks - 1))] += 1
    return Case(
        blocks=blocks,
        counts=tuple(counts),
        minibatches=draw(st.integers(1, 7)),
        window=draw(st.integers(1, 4)),
        prefetch=draw(st.integers(1, 3)),
        accumulate=draw(st.integers(1, 3)),
        clip=draw(st.sampled_from([0.0, 0.1])),
        bf16=draw(st.booleans()),
        beliefs=draw(st.booleans()),
        refresh=draw(st.integers(0, 3)),
    )


class Pause(nn.Module):
    """Gives its input itself, so late that the next message has arrived."""

    def forward(self, h: Tensor) -> Tensor:
        time.sleep(0.003)
        return h


class ChannelsLast(nn.Module):
    """Changes the memory format of a map, and with it the kernels of the blocks that follow."""

    def forward(self, h: Tensor) -> Tensor:
        return h.contiguous(memory_format=torch.channels_last) if h.dim() == 4 else h


class Slice(nn.Module):
    """A view of half of the channels."""

    def forward(self, h: Tensor) -> Tensor:
        return h[:, : h.shape[1] // 2]


def layer(kind: str, h: Tensor) -> nn.Module:
    """A layer of that kind for inputs like h, or one that does nothing where it does not fit."""
    channels, is_map = h.shape[1], h.dim() == 4
    made: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Identity() if is_map else nn.Linear(channels, 12),
        "conv": lambda: nn.Conv2d(channels, 4, 3, padding=1) if is_map else nn.Identity(),
        "view": lambda: nn.Flatten() if is_map else nn.Unflatten(1, (channels, 1, 1)),
        "channels_last": ChannelsLast,
        "slice": lambda: Slice() if channels > 3 else nn.Identity(),
        "pause": Pause,
        "dropout": lambda: nn.Dropout(0.5),
        "no_dropout": lambda: nn.Dropout(0.0),
        "relu_": lambda: nn.ReLU(inplace=True),
        "layer_norm": lambda: nn.LayerNorm(h.shape[1:]),
        "batch_norm": lambda: nn.BatchNorm2d(channels) if is_map else nn.BatchNorm1d(channels),
    }
    return made[kind]()


def head(case: Case, spec: BorderSpec) -> nn.Module:
    try:
        lookahead = bll.Lookahead("linear", refresh=case.refresh, trainable=spec.depth > 0)
        return lookahead(spec)
    except ValueError:  # the next block has no weights, or none that keep the layout
        return bll.Predictive("linear").build(spec).head


def learner(case: Case) -> bll.BlockLocal:
    torch.manual_seed(0)
    h, blocks = torch.randn(ROWS, 4, 4, 4), []
    for kinds in case.blocks:
        block = nn.Sequential()
        for kind in kinds:
            block.append(layer(kind, h))
            h = block[-1](h)
        blocks.append(block)
    blocks[-1].append(nn.Flatten()).append(nn.Linear(h[0].numel(), CLASSES))
    loss = 0.1 * bll.Variational() + bll.Predictive(partial(head, case) if case.refresh else "linear")
    example = torch.randn(2, 4, 4, 4)
    return bll.BlockLocal(blocks, classes=CLASSES, example=example, loss=loss, layout="map", add_beliefs=case.beliefs)


def clip_gradients(parameters: list[nn.Parameter], limit: float, *_: object) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, limit)


def optimizer(case: Case, parameters: list[nn.Parameter]) -> Optimizer:
    made = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    if case.clip:
        made.register_step_pre_hook(partial(clip_gradients, parameters, case.clip))
    return made


def batches(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    for m in range(case.minibatches):
        draws = torch.Generator().manual_seed(m)
        rows = ROWS - (m == case.minibatches - 1)
        yield torch.randn(rows, 4, 4, 4, generator=draws), torch.randint(CLASSES, (rows,), generator=draws)


def arithmetic(case: Case) -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16) if case.bf16 else nullcontext()


def in_one_process(case: Case) -> dict[str, Tensor]:
    """Block after block, the context of the arithmetic entered anew for every step."""
    mine = learner(case)
    optimizers = [optimizer(case, mine.block_parameters(k)) for k in range(len(mine.blocks))]
    found: dict[str, Tensor] = {}
    for m, (x, y) in enumerate(batches(case)):
        h = x.clone()
        for k, stepper in enumerate(optimizers):
            with arithmetic(case), seeded(SEED, m, k, device=x.device):
                loss, h = mine.local(k, h, y)
            found[f"loss{k}.{m}"] = loss.detach()
            (loss * (1 / case.accumulate)).backward()
            if (m + 1) % case.accumulate == 0:
                stepper.step()
                stepper.zero_grad()
    mine.eval()
    for m, (x, _) in enumerate(batches(case)):
        with arithmetic(case):
            found |= {f"exit{k}.{m}": logits for k, logits in enumerate(mine.exits(x))}
    return found | {name: tensor for name, tensor in mine.state_dict().items() if not name.startswith("pool.")}


def in_processes(rank: int, mesh: DeviceMesh, case: Case) -> dict[str, Tensor]:
    """The context of the arithmetic stands around everything."""
    mine = learner(case)
    pipeline = Pipeline(
        mine,
        optimizer=lambda parameters: optimizer(case, parameters),
        placement=case.placement,
        mesh=mesh,
        window=case.window,
        prefetch=case.prefetch,
        accumulate=case.accumulate,
        seed=SEED,
        timeout=30,
        lookahead=case.refresh > 0,
    )
    found = {}
    with arithmetic(case):
        mine_only = [(x.clone() if rank == 0 else None, y) for x, y in batches(case)]
        losses = torch.cat(list(pipeline.train(mine_only)))
        for m, logits in enumerate(pipeline.predict((x.clone() if rank == 0 else None, y) for x, y in batches(case))):
            found |= {f"exit{k}.{m}": part for k, part in zip(pipeline.blocks, logits, strict=True)}
    found |= {f"loss{k}.{m}": losses[m, i] for i, k in enumerate(pipeline.blocks) for m in range(case.minibatches)}
    owned = tuple(f"{part}.{k}." for part in ("blocks", "borders") for k in pipeline.blocks)
    return found | {name: tensor for name, tensor in mine.state_dict().items() if name.startswith(owned)}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[processes.Pool]:
    pool = processes.Pool(processes=3, folder=tmp_path_factory.mktemp("pool"))
    yield pool
    pool.stop()


def test_no_receive_overwrites_what_a_later_block_reads(pool: processes.Pool) -> None:
    """The output of the first block of rank 1 is a view of a receive buffer; the next block reads it late."""
    blocks = (("conv",), ("view",), ("pause", "linear"), ("slice",), ("pause", "linear"))
    case = Case(blocks, counts=(1, 2, 2), minibatches=7, window=7, prefetch=1, accumulate=1, clip=0.0, bf16=False)
    assert_as_in_one_process(pool, case)


def test_a_copy_of_the_next_unit_comes_from_another_rank(pool: processes.Pool) -> None:
    blocks = (("conv", "batch_norm"), ("relu_", "conv", "batch_norm"), ("conv", "dropout"), ("conv",))
    case = Case(blocks, (1, 1, 2), minibatches=7, window=3, prefetch=2, accumulate=2, clip=0.1, bf16=True, refresh=2)
    assert any(lookaheads(border) for border in learner(case).borders)
    assert_as_in_one_process(pool, case)


def test_weights_that_autocast_has_cast_do_not_outlive_a_step(pool: processes.Pool) -> None:
    case = Case(
        (("conv",), ("linear",)), counts=(2,), minibatches=4, window=4, prefetch=1, accumulate=1, clip=0, bf16=True
    )
    assert_as_in_one_process(pool, case)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_random_chains_learn_the_weights_of_one_process_to_the_bit(pool: processes.Pool, case: Case) -> None:
    assert_as_in_one_process(pool, case)


def assert_as_in_one_process(pool: processes.Pool, case: Case) -> None:
    parts = pool.run(in_processes, ranks=len(case.counts), arguments=(case,))
    found = {name: tensor for part in parts for name, tensor in part.items()}
    expected = in_one_process(case)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
