"""Wrong calls of what is in `blocklocal.pipeline`: each is told by the library itself, and moves nothing."""
# pyright: reportArgumentType=false

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
import torch.distributed as dist
from refusals import assert_refused
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import blocklocal as bll
from blocklocal.losses import LocalLoss
from blocklocal.pipeline import Pipeline, Placement, Trace, balanced, load, replicate, schedule, shard, spread

CLASSES = 4
X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % CLASSES
PLACEMENT = Placement((0, 0, 1))
NOT_WHOLE = [None, "1", 1.5, True, [1], math.nan]
NO_TENSOR = ["x", 3, X.tolist(), X.numpy()]
NO_DEVICE = [None, 3, 1.5, True, "gpu", "cuda:99", "meta", "cpu:x"]
SPARSE = [X.to("meta"), X.to_sparse()]
NO_PAIRS = [None, 3, "ab", [3], [None], [X], [(X,)], [(X, Y, Y)], [{"x": X, "y": Y}], ["ab"], X, (X, Y)]

CASES: list[Any] = []


def cases(values: list, call: Callable[[Any], object], *, names: str) -> None:
    """The call with each of the values."""
    for value in values:
        CASES.append(pytest.param(partial(call, value), names, id=f"{names}-{len(CASES)}-{type(value).__name__}"))


def learner(loss: LocalLoss = bll.BLL) -> bll.BlockLocal:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)]
    return bll.BlockLocal(layers, classes=CLASSES, example=X[:2], loss=loss)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def made(**options: Any) -> Pipeline:
    return Pipeline(learner(), **{"optimizer": sgd} | options)


def mesh(*names: str) -> DeviceMesh:
    return DeviceMesh("cpu", torch.zeros([1] * max(1, len(names)), dtype=torch.int64), mesh_dim_names=names or None)


def trained(batches: Any, *, act: str) -> None:
    """The weights stay as they are."""
    pipeline = made()
    before = {name: tensor.clone() for name, tensor in pipeline.learner.state_dict().items()}
    try:
        list(getattr(pipeline, act)(batches))
    finally:
        after = pipeline.learner.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


# Placements and schedules.
cases(
    [None, 3, [], "ab", [1.0, 2.0], torch.ones(2, 3), [torch.ones(3)], ["ab", "cd"], X.numpy()], spread, names="seconds"
)
cases([[[1.0, 2.0], [1.0]], [[1.0], [1.0, 2.0]], [[], [1.0]]], spread, names="seconds")
cases([[[value, 1.0]] for value in (None, "1", -1.0, math.nan, math.inf, True, [1.0])], spread, names="seconds[0][0]")
cases([[[]], [[1.0], [1.0]]], spread, names="every rank needs a block")
cases([None, 3, "001", {0: 0}, torch.tensor([0, 1]), np.array([0, 1]), iter((0, 1))], Placement, names="placement")
cases([(0, value) for value in (None, "1", 1.0, True, math.nan, -1)], Placement, names="placement[1]")
cases([*NOT_WHOLE, 0, -1], lambda v: Placement.even(v, ranks=1), names="blocks")
cases([*NOT_WHOLE, 0, -1], lambda v: Placement.even(3, ranks=v), names="ranks")
cases([*NOT_WHOLE, -1, 2], PLACEMENT.blocks, names="rank")
cases([*NOT_WHOLE, -1, 3], PLACEMENT.receives, names="k")
cases([*NOT_WHOLE, -1, 3], PLACEMENT.sends, names="k")
cases([None, 3, (0, 0, 1)], lambda v: schedule(v, minibatches=2, prefetch=1), names="placement")
cases([*NOT_WHOLE, 0, -1], lambda v: schedule(PLACEMENT, minibatches=v, prefetch=1), names="minibatches")
cases([*NOT_WHOLE, 0, -1], lambda v: schedule(PLACEMENT, minibatches=2, prefetch=v), names="prefetch")
cases([3, "0", [(0, 0)]], lambda v: schedule(PLACEMENT, minibatches=2, prefetch=1, copies=v), names="copies")
cases([None, 3], lambda v: schedule(PLACEMENT, minibatches=2, prefetch=1, copies={1: v}), names="copies[1]")
cases([*NOT_WHOLE, -1, 2], lambda v: schedule(PLACEMENT, minibatches=2, prefetch=1, copies={1: [v]}), names="copies[1]")

# Records.
cases([None, 3, "abc", b"abc", Path("abc"), [None], [3]], load, names="paths")
cases([*NOT_WHOLE, -1], lambda v: Trace(rank=v, replica=0, device=torch.device("cpu")), names="rank")
cases([*NOT_WHOLE, -1], lambda v: Trace(rank=0, replica=v, device=torch.device("cpu")), names="replica")
cases(NO_DEVICE, lambda v: Trace(rank=0, replica=0, device=v), names="device")

# The pipeline's settings.
cases([None, "learner", nn.Linear(6, 4)], lambda v: Pipeline(v, optimizer=sgd), names="learner")
cases(
    [bll.Predictive(bll.Lookahead())],
    lambda v: Pipeline(learner(v), optimizer=sgd),
    names="lookahead=True",
)
cases([bll.Predictive(bll.Unembedding())], lambda v: Pipeline(learner(v), optimizer=sgd), names="bll.Unembedding()")
cases([None, "yes", 1], lambda v: made(lookahead=v), names="lookahead")
cases([*NOT_WHOLE, -1, 2**63], lambda v: made(seed=v), names="seed")
cases(NO_DEVICE, lambda v: made(device=v), names="device")
cases([3, "block", ["block"]], lambda v: made(mesh=v), names="mesh")
cases([(), ("rows",), ("block", "rows"), ("data",)], lambda v: made(mesh=mesh(*v)), names="mesh")
cases(
    [3, "000", {}, torch.zeros(3), [0, "0", 0], [0.0] * 3, [False] * 3], lambda v: made(placement=v), names="placement"
)
cases([[0, 0], (0, 0, 1), PLACEMENT], lambda v: made(placement=v), names="placement")
cases([None, "ddp", 3, nn.Linear], lambda v: made(data_parallel=v), names="data_parallel")
cases([None, "yes", 1, Path("trace")], lambda v: made(trace=v), names="trace")
cases([1e10, 1e300], lambda v: made(timeout=v), names="timeout")
cases([None, torch.optim.SGD, lambda p: None, lambda p: p], lambda v: made(optimizer=v), names="optimizer")
cases([torch.optim.LBFGS], lambda v: made(optimizer=lambda parameters: v(parameters)), names="optimizer")

# Its batches.
for act in ("train", "predict"):
    cases(NO_PAIRS, partial(trained, act=act), names="minibatch")
    cases([[(v, Y)] for v in (*NO_TENSOR, *SPARSE)], partial(trained, act=act), names="x")
    cases([[(X, Y), (None, Y)]], partial(trained, act=act), names="x")
    cases([[(X, v)] for v in (None, *NO_TENSOR, *SPARSE, Y[0])], partial(trained, act=act), names="y")
    cases([[(v, Y)] for v in (X[0], X[:, None], X[:, :5], X.long())], partial(trained, act=act), names="x")
cases([[(X, Y), (X, v)] for v in (Y + 1, Y.float(), Y[:0], Y.to_sparse())], partial(trained, act="train"), names="y")
cases([None, *NO_TENSOR, *SPARSE], lambda v: made().diagnose(v, Y), names="x")
cases([None, *NO_TENSOR, *SPARSE, Y + 1, Y.float(), Y[:4], F.one_hot(Y)], lambda v: made().diagnose(X, v), names="y")

# Measuring a placement, and replicas.
cases([None, "learner", nn.Linear(6, 4)], lambda v: balanced(v, X, Y), names="learner")
cases([None, *NO_TENSOR, *SPARSE, X[:, :5], X[0]], lambda v: balanced(learner(), v, Y), names="x")
cases([None, *NO_TENSOR, *SPARSE, Y + 1, Y[:3]], lambda v: balanced(learner(), X, v), names="y")
cases(NO_DEVICE, lambda v: balanced(learner(), X, Y, device=v), names="device")
cases([3, "block"], lambda v: balanced(learner(), X, Y, mesh=v), names="mesh")
cases([(), ("rows",)], lambda v: balanced(learner(), X, Y, mesh=mesh(*v)), names="mesh")
for spreading in (replicate, shard):
    cases([None, 3, "net"], lambda v, spreading=spreading: spreading(v, mesh("data")), names="step")
    cases([None, 3, "data"], lambda v, spreading=spreading: spreading(nn.Linear(2, 2), v), names="mesh")


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.mark.parametrize(("call", "names"), CASES)
def test_a_wrong_call_is_told(call: Callable[[], object], names: str) -> None:
    assert_refused(call, names=names)


def unreplicated(rank: int) -> dict[str, Tensor]:
    two = DeviceMesh("cpu", torch.tensor([[0, 1]]), mesh_dim_names=("block", "data"))
    assert_refused(lambda: made(mesh=two, data_parallel=lambda step, mesh: None), names="data_parallel")
    return {}


def test_what_data_parallel_gives_is_a_module(tmp_path: Path) -> None:
    processes.run(unreplicated, processes=2, folder=tmp_path)


def test_a_placement_is_any_list_of_whole_numbers(tmp_path: Path) -> None:
    for ranks in ([0, 0, 1], (0, 0, 1), np.array([0, 0, 1]).tolist(), list(torch.tensor([0, 0, 1]))):
        assert Placement(ranks) == PLACEMENT
        assert hash(Placement(ranks)) == hash(PLACEMENT)
    (tmp_path / "trace").touch()
    assert load([str(tmp_path / "trace"), tmp_path / "trace"]) == []


def test_without_processes_a_placement_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    for call in (lambda: balanced(learner(), X, Y), made):
        with pytest.raises(ValueError, match="init_process_group"):
            call()


def test_a_pair_may_be_a_list() -> None:
    losses: list[Tensor] = list(made().train([[X, Y], (X, Y)]))
    assert losses[0].shape == (2, 3)
