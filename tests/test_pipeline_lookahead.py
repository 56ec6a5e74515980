"""Copies of the next unit against the stream: the weights of one process, to the bit, and every message counted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import blocklocal as bll
from blocklocal.lab.report.timeline import summary
from blocklocal.lookahead import lookaheads
from blocklocal.pipeline import Pipeline, load, shard
from blocklocal.pipeline.analysis.timeline import Timeline

CLASSES, BLOCKS, STEPS, ROWS = 4, 5, 11, 6


class Unit(nn.Module):
    """A residual unit with statistics, behind an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.conv, self.norm = nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, h: Tensor) -> Tensor:
        h = self.relu(h)
        return h + self.norm(self.conv(h))


@dataclass(frozen=True)
class Case:
    lookahead: bll.Lookahead
    placement: tuple[int, ...] = (0, 1, 1, 2, 3)
    window: int = 4
    prefetch: int = 2
    accumulate: int = 1
    bf16: bool = False
    beliefs: bool = False
    look: bool = False
    """At predictions and diagnoses between two windows."""

    @property
    def arithmetic(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()


def learner(case: Case) -> bll.BlockLocal:
    torch.manual_seed(0)
    body = [nn.Sequential(Unit(), Unit()), Unit(), nn.Sequential(Unit(), nn.Tanh())]
    top = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    return bll.BlockLocal(
        [nn.Conv2d(3, 6, 3), *body, top],
        classes=CLASSES,
        example=torch.randn(2, 3, 8, 8),
        loss=0.1 * bll.Variational() + bll.Predictive(case.lookahead),
        add_beliefs=case.beliefs,
    )


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def plain(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def minibatches(steps: int = STEPS, *, begin: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(begin, steps):
        draws = torch.Generator().manual_seed(step)
        yield torch.randn(ROWS, 3, 8, 8, generator=draws), torch.randint(CLASSES, (ROWS,), generator=draws)


def state(learner: bll.BlockLocal, blocks: Iterable[int]) -> dict[str, Tensor]:
    owned = tuple(f"{kind}.{k}." for kind in ("blocks", "borders") for k in blocks)
    return {name: tensor.clone() for name, tensor in learner.state_dict().items() if name.startswith(owned)}


def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def in_one_process(case: Case) -> dict[str, Tensor]:
    """The same training by `learner.backward`, an optimizer step after every few batches."""
    mine, losses = learner(case), []
    optimizers = [optimizer(mine.block_parameters(k)) for k in range(BLOCKS)]
    for m, (x, y) in enumerate(minibatches(), start=1):
        with case.arithmetic:
            losses.append(mine.backward(x, y, scale=1 / case.accumulate))
        if m % case.accumulate == 0:
            for one in optimizers:
                one.step()
                one.zero_grad()
    return state(mine, range(BLOCKS)) | {f"loss{k}": torch.stack(losses)[:, k] for k in range(BLOCKS)}


def in_processes(rank: int, mesh: DeviceMesh, case: Case) -> dict[str, Tensor]:
    mine, losses = learner(case), []
    pipeline = Pipeline(
        mine,
        optimizer=optimizer,
        placement=case.placement,
        mesh=mesh,
        window=case.window,
        prefetch=case.prefetch,
        accumulate=case.accumulate,
        lookahead=True,
        timeout=30,
    )
    with case.arithmetic:
        for window in pipeline.train(minibatches()):
            losses.append(window)
            if case.look:
                list(pipeline.predict(minibatches(2)))
                pipeline.diagnose(*next(minibatches()))
    found = torch.cat(losses)
    return state(mine, pipeline.blocks) | {f"loss{k}": found[:, i] for i, k in enumerate(pipeline.blocks)}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[processes.Pool]:
    pool = processes.Pool(processes=4, folder=tmp_path_factory.mktemp("pool"))
    yield pool
    pool.stop()


ONCE = Case(bll.Lookahead(refresh=2))
CASES = {
    "every step": Case(bll.Lookahead(refresh=1)),
    "every second step": ONCE,
    "every third step": Case(bll.Lookahead("conv", refresh=3)),
    "at the first step alone": Case(bll.Lookahead(refresh=100)),
    "a copy that learns": Case(bll.Lookahead(refresh=None)),
    "both": Case(bll.Lookahead(refresh=3, trainable=True)),
    "one process": replace(ONCE, placement=(0,) * BLOCKS),
    "two processes": replace(ONCE, placement=(0, 0, 0, 1, 1), look=True),
    "three processes": replace(ONCE, placement=(0, 0, 1, 1, 2), prefetch=4, window=7),
    "window by window": Case(bll.Lookahead(refresh=2), window=1, prefetch=1),
    "bf16": Case(bll.Lookahead(refresh=2, trainable=True), bf16=True),
    "accumulation": Case(bll.Lookahead(refresh=2), accumulate=3, window=3),
    "beliefs": Case(bll.Lookahead("linear", refresh=2), beliefs=True, look=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_processes_learn_the_weights_of_one_to_the_bit(case: Case, pool: processes.Pool) -> None:
    parts = pool.run(in_processes, ranks=case.placement[-1] + 1, arguments=(case,))
    assert_same(together(parts), in_one_process(case))


def test_a_copy_that_is_late_would_be_seen() -> None:
    """In one process: a refresh at another step gives other weights, so that the tests above compare something."""
    first, second = (in_one_process(Case(bll.Lookahead(refresh=refresh))) for refresh in (2, 3))
    assert not torch.equal(first["blocks.0.weight"], second["blocks.0.weight"])


def first_part(rank: int, mesh: DeviceMesh, case: Case, steps: int) -> dict[str, Tensor]:
    mine = learner(case)
    pipeline = Pipeline(mine, optimizer=plain, placement=case.placement, mesh=mesh, window=2, lookahead=True)
    list(pipeline.train(minibatches(steps)))
    return state(mine, pipeline.blocks)


def second_part(rank: int, mesh: DeviceMesh, case: Case, steps: int, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """A rank gets the state of its own blocks, and no other."""
    mine = learner(case)
    pipeline = Pipeline(mine, optimizer=plain, placement=case.placement, mesh=mesh, window=3, lookahead=True)
    pipeline.minibatches = steps
    owned = state(mine, pipeline.blocks)
    mine.load_state_dict({name: kept[name] for name in owned}, strict=False)
    list(pipeline.train(minibatches(begin=steps)))
    return state(mine, pipeline.blocks)


@pytest.mark.parametrize("steps", [3, 4, 6])
def test_it_goes_on_between_two_refreshes_on_another_number_of_processes(steps: int, pool: processes.Pool) -> None:
    case = Case(bll.Lookahead(refresh=3, trainable=True))
    kept = together(pool.run(first_part, ranks=4, arguments=(case, steps)))
    other = replace(case, placement=(0, 0, 1, 2, 2))
    found = together(pool.run(second_part, ranks=3, arguments=(other, steps, kept)))
    assert_same(found, together(pool.run(first_part, ranks=4, arguments=(case, STEPS))))


def replicas(rank: int, ranks: int, sharded: bool) -> dict[str, Tensor]:
    """What the first replica of every block has."""
    mesh = init_device_mesh("cpu", (ranks, 2), mesh_dim_names=("block", "data"))
    case, share = Case(bll.Lookahead(refresh=2, trainable=True)), mesh.get_local_rank("data")
    mine = learner(case)
    if sharded:
        with pytest.raises(ValueError, match="replicas that hold shares of a block have no unit to copy as a whole"):
            Pipeline(mine, optimizer=optimizer, mesh=mesh, data_parallel=shard, lookahead=True)
        return {}
    pipeline = Pipeline(mine, optimizer=optimizer, mesh=mesh, lookahead=True)
    list(pipeline.train((x[share::2], y[share::2]) for x, y in minibatches()))
    list(pipeline.predict((x[share::2], y[share::2]) for x, y in minibatches(1)))
    return state(mine, pipeline.blocks) if share == 0 else {}


def test_replicas_learn_the_same_on_one_rank_and_on_two(tmp_path: Path) -> None:
    one, two = (
        together(processes.run(replicas, processes=2 * ranks, folder=tmp_path, arguments=(ranks, False)))
        for ranks in (1, 2)
    )
    assert_same(two, one)
    processes.run(replicas, processes=2, folder=tmp_path, arguments=(1, True))


def built_on_meta(rank: int, mesh: DeviceMesh, case: Case) -> dict[str, Tensor]:
    """The weights at the beginning, which no rank has seen but of its own blocks, and those at the end."""
    with torch.device("meta"):
        mine = learner(case)
    pipeline = Pipeline(
        mine, optimizer=optimizer, placement=case.placement, mesh=mesh, seed=5, lookahead=True, timeout=30
    )
    found = {f"begin.{name}": tensor for name, tensor in state(mine, pipeline.blocks).items()}
    list(pipeline.train(minibatches()))
    on_meta = {name.split(".")[1] for name, tensor in mine.state_dict().items() if tensor.is_meta}
    assert on_meta == {str(k) for k in range(BLOCKS) if k not in pipeline.blocks}
    return found | state(mine, pipeline.blocks)


@pytest.mark.parametrize(
    "lookahead",
    [bll.Lookahead(refresh=None), bll.Lookahead(refresh=3), bll.Lookahead(refresh=3, trainable=True)],
    ids=["trained", "frozen", "both"],
)
def test_the_first_copy_of_a_model_without_memory_is_that_of_one_process(
    lookahead: bll.Lookahead, pool: processes.Pool
) -> None:
    case = Case(lookahead)
    found = together(pool.run(built_on_meta, ranks=4, arguments=(case,)))
    alone = replace(case, placement=(0,) * BLOCKS)
    assert_same(together(pool.run(built_on_meta, ranks=1, arguments=(alone,))), found)
    begin = {name.removeprefix("begin."): tensor for name, tensor in found.items() if name.startswith("begin.")}
    single = learner(case)
    single.load_state_dict(begin, strict=False)
    for k, border in enumerate(single.borders):
        (head,) = lookaheads(border)
        for made in head.copies:
            unit = [*made.parameters(), *made.buffers()]
            assert all(torch.equal(copy, own) for copy, own in zip(unit, head.source(), strict=True)), k
    optimizers = [optimizer(single.block_parameters(k)) for k in range(BLOCKS)]
    for x, y in minibatches():
        single.backward(x, y, optimizers=optimizers)
    assert_same({name: found[name] for name in begin}, state(single, range(BLOCKS)))


class Scaled(nn.Module):
    """A container with a parameter of its own, which is cut where the unit ends."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.unit, self.after = nn.Parameter(torch.ones(6, 1, 1)), Unit(), nn.Conv2d(6, 6, 3, padding=1)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.scale)

    def forward(self, h: Tensor) -> Tensor:
        return self.after(self.unit(h * self.scale))


def container(rank: int, device: str) -> dict[str, Tensor]:
    with torch.device(device):
        top = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
        blocks = [nn.Conv2d(3, 6, 3), Scaled(), nn.Sequential(Unit(), top)]
        loss = bll.Predictive(bll.Lookahead(refresh=1))
        mine = bll.BlockLocal(blocks, classes=CLASSES, example=torch.randn(2, 3, 8, 8), loss=loss)
    Pipeline(mine, optimizer=optimizer, lookahead=True)
    return {}


def test_a_unit_with_parameters_of_its_container_needs_memory_from_the_beginning(tmp_path: Path) -> None:
    processes.run(container, processes=1, folder=tmp_path, arguments=("cpu",))
    with pytest.raises(AssertionError, match="move the tensors of a container that is cut into a submodule"):
        processes.run(container, processes=1, folder=tmp_path, arguments=("meta",))


def watched(rank: int, refresh: int | None, folder: str) -> dict[str, Tensor]:
    """Trains and predicts, and keeps its trace; the bytes sent to each rank, and those of a unit that comes here."""
    sent, isend = torch.zeros(3, dtype=torch.int64), dist.isend

    def counting(tensor: Tensor, *arguments: Any, **keywords: Any) -> dist.Work | None:
        assert not tensor.requires_grad
        sent[keywords["group_dst"]] += tensor.nbytes
        return isend(tensor, *arguments, **keywords)

    dist.isend = counting
    mine = learner(Case(bll.Lookahead(refresh=refresh)))
    pipeline = Pipeline(mine, optimizer=optimizer, placement=(0, 0, 1, 1, 2), lookahead=True, trace=True)
    list(pipeline.train(minibatches()))
    list(pipeline.predict(minibatches(2)))
    assert pipeline.trace is not None
    pipeline.trace.save(Path(folder, f"{rank}.jsonl"))
    records = pipeline.trace.records
    assert all(one.end == other.start for one, other in pairwise(records))
    unit = sum(tensor.nbytes for head in lookaheads(mine.borders[2 * rank + 1 :][:1]) for tensor in head.own())
    return {"sent": sent, "unit": torch.tensor(unit)}


def test_every_message_against_the_stream_is_counted(tmp_path: Path) -> None:
    (tmp_path / "trace").mkdir()
    arguments = (3, str(tmp_path / "trace"))
    parts = processes.run(watched, processes=3, folder=tmp_path, arguments=arguments)
    sent, units = torch.stack([part["sent"] for part in parts]), [int(part["unit"]) for part in parts[:2]]
    weights = 4 * (6 * 6 * 9 + 6)
    assert units == [weights + 4 * 4 * 6 + 8, weights], "a unit with batch normalisation, and a convolution"
    refreshes = [0, 3, 6, 9]
    assert sent.diagonal(-1).tolist() == [len(refreshes) * unit for unit in units]
    assert sent.diagonal(-2).tolist() == [0]
    timeline = Timeline(load((tmp_path / "trace").iterdir()))
    pairs = [(sender, arrival) for sender, arrival in timeline.messages() if sender.phase == "copy"]
    for rank, unit in enumerate(units):
        own = [(a.minibatch, a.size, a.rank) for a, b in pairs if b.rank == rank and a.start < b.start]
        assert own == [(m, unit, rank + 1) for m in refreshes]
    assert sum(timeline.sizes("copy")) == len(refreshes) * sum(units)
    assert len(timeline.sizes("send")) == 2 * STEPS
    assert summary(timeline)[-1] == f"copies against the stream: 8, of {4 * sum(units) / 2**20:.2f} MiB together"


def test_what_refreshes_nothing_sends_nothing_back(tmp_path: Path) -> None:
    (tmp_path / "trace").mkdir()
    parts = processes.run(watched, processes=3, folder=tmp_path, arguments=(None, str(tmp_path / "trace")))
    assert torch.stack([part["sent"] for part in parts]).tril(-1).sum() == 0
    assert not any("copies" in line for line in summary(Timeline(load((tmp_path / "trace").iterdir()))))


def misused(rank: int, folder: str) -> dict[str, Tensor]:
    """In the end rank 1 does nothing until rank 0 has given up."""
    gave_up = Path(folder, "gave-up")
    mine = learner(ONCE)
    with pytest.raises(ValueError, match="messages flow one way: pass lookahead=True to send copies"):
        Pipeline(mine, optimizer=optimizer)
    Pipeline(mine, optimizer=optimizer, lookahead=True)
    mine.share_feedback(False)
    with pytest.raises(RuntimeError, match="the next block learns in another process: train with the pipeline"):
        mine.backward(*next(minibatches()))
    mine = learner(ONCE)
    pipeline = Pipeline(mine, optimizer=optimizer, lookahead=True, timeout=0.5, placement=(0, 0, 0, 0, 1))
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"rank 0, block 3, minibatch 0: no copy from rank 1 within 0.5 s"):
            list(pipeline.train(minibatches()))
        gave_up.touch()
    while not gave_up.exists():
        time.sleep(0.01)
    return {}


def test_misuse_is_named(tmp_path: Path) -> None:
    (tmp_path / "word").mkdir()
    processes.run(misused, processes=2, folder=tmp_path, arguments=(str(tmp_path / "word"),))
