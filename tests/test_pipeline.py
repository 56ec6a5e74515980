"""Blocks over processes: the weights of one process, to the bit, and nothing that flows back."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.pipeline import Pipeline, Placement, balanced, placement, replicate, shard

CLASSES, BLOCKS, STEPS = 4, 4, 60
LAST = 5  # samples in the last minibatch, which is smaller


class Unit(nn.Module):
    """Begins with an in-place activation: it would write into the previous block's output."""

    def __init__(self, inputs: int, outputs: int, *, normalise: bool) -> None:
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs) if normalise else nn.GroupNorm(2, outputs)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.conv(self.relu(h)))


def learner(*, normalise: bool = True, dropout: float = 0.0) -> bll.BlockLocal:
    """normalise: with BatchNorm, in the blocks and in the heads at the borders."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout(dropout))
    top = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    blocks = [stem, Unit(6, 8, normalise=normalise), Unit(8, 6, normalise=normalise), top]
    loss = bll.BLL if normalise else 0.1 * bll.Variational() + bll.Predictive("linear")
    return bll.BlockLocal(blocks, classes=CLASSES, example=torch.randn(2, 3, 8, 8), loss=loss)


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def minibatches(steps: int = STEPS, *, size: int = 12) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        draws = torch.Generator().manual_seed(step)
        rows = LAST if step == STEPS - 1 else size
        yield torch.randn(rows, 3, 8, 8, generator=draws), torch.randint(CLASSES, (rows,), generator=draws)


def as_rank(batches: Iterator[tuple[Tensor, Tensor]], rank: int) -> Iterator[tuple[Tensor | None, Tensor]]:
    return ((x if rank == 0 else None, y) for x, y in batches)


def state(learner: bll.BlockLocal, blocks: Iterable[int]) -> dict[str, Tensor]:
    owned = tuple(f"{kind}.{k}." for kind in ("blocks", "borders") for k in blocks)
    tensors = {name: tensor for name, tensor in learner.state_dict().items() if name.startswith(owned)}
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in tensors.items()
    }


def trained(rank: int, options: dict) -> dict[str, Tensor]:
    """One rank of a pipeline: its weights and its losses."""
    mine = learner(dropout=options.pop("dropout", 0.0))
    pipeline = Pipeline(mine, optimizer=optimizer, **options)
    losses = torch.cat(list(pipeline.train(as_rank(minibatches(), rank))))
    assert losses.shape == (STEPS, len(pipeline.blocks))
    assert pipeline.minibatches == STEPS
    return state(mine, pipeline.blocks) | {f"loss{k}": losses[:, i] for i, k in enumerate(pipeline.blocks)}


def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


@cache
def one_process() -> dict[str, Tensor]:
    """The same training by `learner.backward`."""
    mine = learner()
    optimizers = [optimizer(mine.block_parameters(k)) for k in range(BLOCKS)]
    losses = torch.stack([mine.backward(x, y, optimizers=optimizers) for x, y in minibatches()])
    return state(mine, range(BLOCKS)) | {f"loss{k}": losses[:, k] for k in range(BLOCKS)}


@pytest.mark.parametrize(
    ("count", "options"),
    [(1, {}), (2, {}), (2, {"placement": [0, 1, 1, 1], "window": 3, "prefetch": 1}), (3, {"prefetch": 4}), (4, {})],
)
def test_processes_learn_the_weights_of_one_to_the_bit(count: int, options: dict, tmp_path: Path) -> None:
    found = together(processes.run(trained, processes=count, folder=tmp_path, arguments=(options,)))
    expected = one_process()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_placement_changes_nothing_where_messages_are_rounded_and_layers_draw(tmp_path: Path) -> None:
    options = {"message_dtype": torch.bfloat16, "dropout": 0.5, "seed": 3}
    one, two = (
        together(processes.run(trained, processes=count, folder=tmp_path, arguments=(options,))) for count in (1, 2)
    )
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert not torch.equal(one["loss1"], one_process()["loss1"])


def plain_loop(rank: int) -> dict[str, Tensor]:
    """The schedule without the executor: isend and irecv around `learner.local`, two blocks on rank 0."""
    mine = learner()
    blocks = Placement((0, 0, 1, 2)).blocks(rank)
    optimizers = {k: optimizer(mine.block_parameters(k)) for k in blocks}
    sends = []
    for x, y in minibatches():
        h = x
        if rank > 0:
            h = torch.empty(len(y), *{1: (8, 6, 6), 2: (6, 6, 6)}[rank])
            dist.recv(h, src=rank - 1)
        for k in blocks:
            loss, h = mine.local(k, h, y)
            if k == blocks[-1] and k < BLOCKS - 1:
                sends.append(dist.isend(h, dst=rank + 1))
            loss.backward()
            optimizers[k].step()
            optimizers[k].zero_grad()
    for send in sends:
        send.wait()
    return state(mine, blocks)


def test_the_executor_does_what_a_plain_loop_does(tmp_path: Path) -> None:
    plain = together(processes.run(plain_loop, processes=3, folder=tmp_path))
    assert [name for name in plain if not torch.equal(plain[name], one_process()[name])] == []


def replicas(rank: int, sharded: bool, dimensions: tuple[str, str]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=dimensions)
    mine = learner(normalise=False)
    pipeline = Pipeline(mine, optimizer=optimizer, mesh=mesh, data_parallel=shard if sharded else replicate)
    share = mesh.get_local_rank("data")
    for _ in pipeline.train((x[share::2], y[share::2]) for x, y in minibatches(STEPS - 1)):
        pass
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in pipeline.stages[0].parameters())
    name = f"held{mesh.get_local_rank('block')}.{share}"
    return state(mine, pipeline.blocks) | {name: torch.tensor(held)}


@pytest.mark.parametrize(
    ("sharded", "dimensions"), [(False, ("block", "data")), (False, ("data", "block")), (True, ("block", "data"))]
)
def test_replicas_learn_from_the_global_batch(sharded: bool, dimensions: tuple[str, str], tmp_path: Path) -> None:
    found = together(processes.run(replicas, processes=4, folder=tmp_path, arguments=(sharded, dimensions)))
    held = [int(found.pop(f"held0.{share}")) for share in range(2)]
    single = learner(normalise=False)
    optimizers = [optimizer(single.block_parameters(k)) for k in range(BLOCKS)]
    for x, y in minibatches(STEPS - 1):
        single.backward(x, y, optimizers=optimizers)
    found = {name: tensor for name, tensor in found.items() if not name.startswith("held")}
    assert_close(found, state(single, range(BLOCKS)), rtol=1e-4, atol=1e-5)
    whole = sum(p.numel() for p in single.block_parameters(0))
    assert (held[0] + held[1] == whole) if sharded else (held[0] == held[1] == whole)


def watched(rank: int) -> dict[str, Tensor]:
    """Trains and predicts, and returns for each other rank the bytes sent to it; asserts what arrives."""
    sent = torch.zeros(3, dtype=torch.int64)
    isend, irecv = dist.isend, dist.irecv
    core = dist.distributed_c10d

    def counting(tensor: Tensor, *arguments, **keywords):
        assert tensor.grad_fn is None
        assert not tensor.requires_grad
        destination = keywords["group_dst"]
        sent[destination] += tensor.nbytes
        return isend(tensor, *arguments, **keywords)

    def checking(tensor: Tensor, *arguments, **keywords):
        assert not tensor.requires_grad
        assert keywords["group_src"] == rank - 1
        return irecv(tensor, *arguments, **keywords)

    def forbidden(*_, **__):
        raise AssertionError("a pipeline without replicas needs messages only")

    others = ("send", "recv", "broadcast", "all_reduce", "all_gather", "barrier", "send_object_list")
    for module in (dist, core):
        for name, replacement in {"isend": counting, "irecv": checking, **dict.fromkeys(others, forbidden)}.items():
            setattr(module, name, replacement)
    pipeline = Pipeline(learner(), optimizer=optimizer, message_dtype=torch.bfloat16)
    list(pipeline.train(as_rank(minibatches(11), rank)))
    list(pipeline.predict(as_rank(minibatches(2), rank)))
    return {"sent": sent}


def test_nothing_is_sent_backward(tmp_path: Path) -> None:
    sent = torch.stack([part["sent"] for part in processes.run(watched, processes=3, folder=tmp_path)])
    message = (11 + 2) * 12 * 6 * 6 * 2  # minibatches, rows, positions, bytes; times channels
    preambles = 8 * 3 * (5 + 2 * 8)  # of three windows: the form of the messages, and what the minibatches are
    assert sent.tolist() == [[0, 8 * message + preambles, 0], [0, 0, 6 * message + preambles], [0, 0, 0]]


def unequal_rates(rank: int) -> dict[str, Tensor]:
    mine = learner()
    rate = (0.05, 5.0)[rank]
    pipeline = Pipeline(mine, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9))
    list(pipeline.train(as_rank(minibatches(), rank)))
    return state(mine, pipeline.blocks)


def test_what_a_later_block_does_changes_no_earlier_one(tmp_path: Path) -> None:
    first, second = processes.run(unequal_rates, processes=2, folder=tmp_path)
    assert [name for name, tensor in first.items() if not torch.equal(tensor, one_process()[name])] == []
    assert not torch.equal(second["blocks.3.3.weight"], one_process()["blocks.3.3.weight"])


def predicted(rank: int) -> dict[str, Tensor]:
    mine = learner()
    pipeline = Pipeline(mine, optimizer=optimizer, trace=True)
    list(pipeline.train(as_rank(minibatches(5), rank)))
    learnt = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    exits = torch.cat(list(pipeline.predict(as_rank(minibatches(), rank))), 1)
    assert all(torch.equal(learnt[name], tensor) for name, tensor in mine.state_dict().items())
    assert pipeline.trace is not None
    records = pipeline.trace.records
    assert {record.minibatch for record in records} == set(range(5))
    assert all(before.end == after.start for before, after in pairwise(records))
    assert sum(record.phase == "backward" for record in records) == 5 * len(pipeline.blocks)
    return state(mine, pipeline.blocks) | {f"exit{k}": exits[i] for i, k in enumerate(pipeline.blocks)}


def test_predictions_of_all_exits(tmp_path: Path) -> None:
    found = together(processes.run(predicted, processes=2, folder=tmp_path))
    single = learner().eval()
    single.load_state_dict({name: tensor for name, tensor in found.items() if not name.startswith("exit")})
    exits = [torch.stack(single.exits(x)) for x, _ in minibatches()]
    assert torch.equal(torch.stack([found[f"exit{k}"] for k in range(BLOCKS)]), torch.cat(exits, 1))


def placed(rank: int) -> dict[str, Tensor]:
    mine = learner()
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    found = balanced(mine, *next(minibatches(1)))
    assert all(torch.equal(before[name], tensor) for name, tensor in mine.state_dict().items())
    assert Pipeline(mine, optimizer=optimizer, placement=found).blocks == found.blocks(rank)
    return {"ranks": torch.tensor(found.ranks)}


def test_all_ranks_learn_of_the_balanced_placement(tmp_path: Path) -> None:
    first, second = processes.run(placed, processes=2, folder=tmp_path)
    assert torch.equal(first["ranks"], second["ranks"])


def placed_on_uneven_devices(rank: int, dimensions: tuple[str, str]) -> dict[str, Tensor]:
    """Four processes are two ranks of two replicas; process 3 takes three times as long as the others."""

    def measured(*_: object, **__: object) -> list[float]:
        return [3.0 if rank == 3 else 1.0] * BLOCKS

    placement.block_seconds = measured
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=dimensions)
    return {"ranks": torch.tensor(balanced(learner(), *next(minibatches(1)), mesh=mesh).ranks)}


@pytest.mark.parametrize("dimensions", [("block", "data"), ("data", "block")])
def test_a_slow_device_gets_less_to_do(dimensions: tuple[str, str], tmp_path: Path) -> None:
    for part in processes.run(placed_on_uneven_devices, processes=4, folder=tmp_path, arguments=(dimensions,)):
        assert part["ranks"].tolist() == [0, 0, 0, 1]


def misused(rank: int) -> dict[str, Tensor]:
    with pytest.raises(ValueError, match="placement \\[0, 0, 1\\] is not one of 4 blocks on 1 ranks"):
        Pipeline(learner(), optimizer=optimizer, placement=[0, 0, 1])
    wrong: list[tuple[dict, str]] = [
        ({"window": 1.5}, "window=1.5"),
        ({"window": "8"}, "window is"),
        ({"prefetch": 0}, "prefetch=0"),
        ({"accumulate": True}, "accumulate=True"),
        ({"timeout": None}, "timeout is"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"message_dtype": torch.int64}, "message_dtype=torch.int64"),
        ({"message_dtype": "bf16"}, "message_dtype='bf16'"),
        ({"optimizer": None}, "optimizer is"),
    ]
    for options, words in wrong:
        with pytest.raises((TypeError, ValueError), match=words):
            Pipeline(learner(), **{"optimizer": optimizer} | options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="learner is"):
        Pipeline(nn.Linear(2, 2), optimizer=optimizer)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="window=0"):
        Pipeline(learner(), optimizer=optimizer, window=0)
    with pytest.raises(ValueError, match="rank of block 0 reads the inputs"):
        list(Pipeline(learner(), optimizer=optimizer).train((None, y) for _, y in minibatches(1)))
    with pytest.raises(ValueError, match="labels run from 4 to 4, but must be from 0 to 3"):
        list(Pipeline(learner(), optimizer=optimizer).train((x, torch.full_like(y, 4)) for x, y in minibatches(1)))
    with pytest.raises(
        ValueError,
        match=r"block 0, minibatch 0: the block returns \(12, 6, 4, 4\) for 12 targets, but returned \(6, 6, 6\)",
    ):
        list(Pipeline(learner(), optimizer=optimizer).train((x[..., 1:-1, 1:-1], y) for x, y in minibatches(1)))
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("rows",))
    with pytest.raises(ValueError, match="mesh with dimensions"):
        Pipeline(learner(), optimizer=optimizer, mesh=mesh)
    return {}


def test_misuse_is_named(tmp_path: Path) -> None:
    processes.run(misused, processes=1, folder=tmp_path)
    with pytest.raises(ValueError, match="init_process_group"):
        Pipeline(learner(), optimizer=optimizer)


def neglected(rank: int, deaf: int, folder: str) -> dict[str, Tensor]:
    """The process `deaf` of two does nothing until the other has given up."""
    gave_up = Path(folder, f"gave-up-on-{deaf}")
    pipeline = Pipeline(learner(), optimizer=optimizer, placement=[0, 0, 1, 1], timeout=0.5)
    if rank == deaf:
        while not gave_up.exists():
            time.sleep(0.01)
        return {}
    said = (
        "rank 1, block 2, minibatch 0: no message from rank 0 within 0.5 s",
        "rank 0, block 1, minibatch 0: rank 1 did not take the message within 0.5 s",
    )
    with pytest.raises(RuntimeError, match=said[deaf]):
        list(pipeline.train(as_rank(minibatches(3), rank)))
    gave_up.touch()
    return {}


@pytest.mark.parametrize("deaf", [0, 1])
def test_a_message_is_waited_for_no_longer_than_the_timeout(deaf: int, tmp_path: Path) -> None:
    (tmp_path / "word").mkdir()
    processes.run(neglected, processes=2, folder=tmp_path, arguments=(deaf, str(tmp_path / "word")))


def other_targets(rank: int, change: str) -> dict[str, Tensor]:
    """Rank 1 has the same minibatches in another order, more or fewer of them, or more or fewer rows."""
    batches = list(as_rank(minibatches(4), rank))
    changed = {
        "order": batches[::-1],
        "fewer": batches[:3],
        "more": list(as_rank(minibatches(5), rank)),
        "rows": [(x, y[:-1]) for x, y in batches],
    }[change]
    pipeline = Pipeline(learner(), optimizer=optimizer, timeout=5)
    if rank == 0:
        with suppress(RuntimeError):  # rank 1 has ended
            list(pipeline.train(batches))
        return {}
    with pytest.raises(ValueError, match="rank 1, block 2, minibatch 0: rank 0 reads other targets"):
        list(pipeline.train(changed))
    return {}


@pytest.mark.parametrize("change", ["order", "fewer", "more", "rows"])
def test_ranks_that_read_other_targets_are_told(change: str, tmp_path: Path) -> None:
    processes.run(other_targets, processes=2, folder=tmp_path, arguments=(change,))


def interrupted(rank: int) -> dict[str, Tensor]:
    """A look at the predictions between two windows; training under torch.no_grad() is refused."""
    mine = learner()
    pipeline = Pipeline(mine, optimizer=optimizer, window=8)
    losses = []
    for window in pipeline.train(as_rank(minibatches(), rank)):
        losses.append(window)
        list(pipeline.predict(as_rank(minibatches(2), rank)))
    with torch.no_grad(), pytest.raises(ValueError, match=r"Pipeline.train needs gradients"):
        list(pipeline.train(as_rank(minibatches(1), rank)))
    found = torch.cat(losses)
    return state(mine, pipeline.blocks) | {f"loss{k}": found[:, i] for i, k in enumerate(pipeline.blocks)}


def test_predictions_between_two_windows_change_nothing(tmp_path: Path) -> None:
    found = together(processes.run(interrupted, processes=1, folder=tmp_path))
    assert [name for name, tensor in one_process().items() if not torch.equal(found[name], tensor)] == []


def broken(rank: int) -> dict[str, Tensor]:
    def refuse(*_: object) -> None:
        raise KeyError("weights")

    mine = learner()
    mine.blocks[2].register_forward_pre_hook(refuse)
    pipeline = Pipeline(mine, optimizer=optimizer)
    with pytest.raises(RuntimeError, match="rank 0, block 2, minibatch 0: KeyError: 'weights'"):
        list(pipeline.train(minibatches(3)))
    wide = Pipeline(learner(), optimizer=optimizer)
    wide.learner.blocks[0].double()
    wide.learner.borders[0].double()
    with pytest.raises(ValueError, match=r"the block returns torch.float64, but messages are torch.float32"):
        list(wide.train((x.double(), y) for x, y in minibatches(1)))
    return {}


def test_errors_name_rank_block_and_minibatch(tmp_path: Path) -> None:
    processes.run(broken, processes=1, folder=tmp_path)


def built_on_meta(rank: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        mine = learner()
    pipeline = Pipeline(mine, optimizer=optimizer, seed=5)
    list(pipeline.train(as_rank(minibatches(3), rank)))
    on_meta = {name.split(".")[1] for name, tensor in mine.state_dict().items() if tensor.is_meta}
    assert on_meta == {str(k) for k in range(BLOCKS) if k not in pipeline.blocks}
    return state(mine, pipeline.blocks)


def test_a_rank_makes_its_own_blocks_only_and_the_same_under_every_placement(tmp_path: Path) -> None:
    one, two = (together(processes.run(built_on_meta, processes=count, folder=tmp_path)) for count in (1, 2))
    assert one.keys() == one_process().keys() - {f"loss{k}" for k in range(BLOCKS)}
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert one["blocks.0.0.weight"].std() > 0.05


def without_initialisation(rank: int) -> dict[str, Tensor]:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, h: Tensor) -> Tensor:
            return h * self.scale

    with torch.device("meta"):
        mine = bll.BlockLocal([Scale(), nn.Linear(8, CLASSES)], classes=CLASSES, example=torch.randn(2, 8))
    with pytest.raises(ValueError, match="'block' of block 0, a Scale, is on the meta device"):
        Pipeline(mine, optimizer=optimizer)
    return {}


def test_a_module_that_cannot_be_initialised_is_named(tmp_path: Path) -> None:
    processes.run(without_initialisation, processes=1, folder=tmp_path)
