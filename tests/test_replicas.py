"""A learner in several processes, each with a share of every batch: its feedback is that of the whole batch."""

import copy
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.pipeline import Pipeline, balanced

CLASSES = 4


def learner(*, labels: bool) -> bll.BlockLocal:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 4)]
    targets: dict = {"classes": CLASSES} if labels else {"outputs": CLASSES, "criterion": nn.functional.mse_loss}
    return bll.BlockLocal(blocks, example=torch.randn(2, 6), loss=bll.Variational() + bll.Predictive(), **targets)


def batch(step: int, *, labels: bool, samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(samples, 6, generator=generator)
    y = torch.randint(CLASSES, (samples,), generator=generator)
    return x, y if labels else nn.functional.one_hot(y, CLASSES) + 0.1 * x[:, :4]


def result(one: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in one.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in one.named_buffers()}


def train_replica(rank: int, labels: bool, shares: tuple[int, int], early: bool) -> dict[str, Tensor]:
    one = learner(labels=labels)
    if early:
        one = copy.deepcopy(one)
    one.share_feedback(None if early else dist.group.WORLD)
    one = copy.deepcopy(one)  # which keeps the group
    wrapped = DistributedDataParallel(one)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        x, y = (whole.split(shares)[rank] for whole in batch(step, labels=labels, samples=sum(shares)))
        torch.stack(wrapped(x, y)).sum().backward()
        if step < 2:
            optimizer.step()
    return result(one)


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "dense"])
def test_replicas_learn_as_one_process(labels: bool, tmp_path: Path) -> None:
    shares = (8, 8)
    first, second = processes.run(train_replica, processes=2, folder=tmp_path, arguments=(labels, shares, labels))
    alone = learner(labels=labels)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        alone.backward(*batch(step, labels=labels, samples=16))
        if step < 2:
            optimizer.step()
    expected = result(alone)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert_close(first[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_uneven_shares_have_the_feedback_of_the_whole_batch(tmp_path: Path) -> None:
    """DDP weighs the processes, not the samples: the gradient is the mean of those of the shares."""
    shares = (11, 5)
    first, second = processes.run(train_replica, processes=2, folder=tmp_path, arguments=(True, shares, True))
    alone = learner(labels=True)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        x, y = batch(step, labels=True, samples=16)
        with torch.enable_grad():
            alone.train()(x, y)  # fits the feedback to the whole batch
        alone.eval()  # and keeps it
        for i in range(2):
            alone.backward(x.split(shares)[i], y.split(shares)[i], scale=0.5)
        if step < 2:
            optimizer.step()
    for name, value in result(alone).items():
        assert torch.equal(first[name], second[name]), name
        # the second block's feedback is fitted to what the first gives, which is the same in both ways
        assert_close(first[name], value, rtol=1e-4, atol=1e-6, msg=name)


def hooked() -> bll.Hooked:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    loss = bll.Variational() + bll.Predictive()
    return bll.Hooked(model, at=["1", "3"], classes=CLASSES, example=torch.randn(2, 6), loss=loss)


def train_hooked(rank: int) -> dict[str, Tensor]:
    one = hooked()
    one.share_feedback()
    wrapped = DistributedDataParallel(one)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    for step in range(3):
        x, y = (whole.chunk(2)[rank] for whole in batch(step, labels=True, samples=16))
        torch.stack(wrapped(x, y)).sum().backward()
        if step < 2:
            optimizer.step()
            optimizer.zero_grad()
    return result(one)


def test_replicas_of_a_hooked_model_learn_as_one_process(tmp_path: Path) -> None:
    first, second = processes.run(train_hooked, processes=2, folder=tmp_path)
    alone = hooked()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(3):
        alone.backward(*batch(step, labels=True, samples=16))
        if step < 2:
            optimizer.step()
            optimizer.zero_grad()
    for name, value in result(alone).items():
        assert torch.equal(first[name], second[name]), name
        assert_close(first[name], value, rtol=1e-4, atol=1e-6, msg=name)


def say_nothing(rank: int) -> list[str]:
    one, (x, y) = learner(labels=True), batch(rank, labels=True, samples=8)
    told = []
    for call in (one, one.backward, DistributedDataParallel(one)):
        before = copy.deepcopy(one.state_dict()) if call is not one else None
        try:
            call(x, y)
        except ValueError as error:
            told.append(str(error))
        if before is not None:
            assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    with torch.no_grad():
        one(x, y)  # a loss for validation learns nothing
    one.eval()(x, y)
    plain = bll.BlockLocal(nn.Linear(6, CLASSES), blocks=1, classes=CLASSES)
    plain.backward(x, y)  # nothing is fitted
    one.train().share_feedback(False)
    one.backward(x, y)  # every process has a learner of its own
    told.append(str(one.borders[0].get_submodule("feedback").get_buffer("second").sum().item()))
    return told


def test_several_processes_are_asked_what_they_share(tmp_path: Path) -> None:
    for *told, count in processes.run(say_nothing, processes=2, folder=tmp_path):
        assert len(told) == 3
        assert all("2 processes train" in line and "learner.share_feedback()" in line for line in told)
        assert float(count) == 8


def spoil(rank: int) -> dict[str, Tensor]:
    one, (x, y) = learner(labels=True), batch(0, labels=True, samples=8)
    one.share_feedback()
    if rank == 1:
        x[:4] = float("nan")
    one.backward(x, y)
    return result(one)


def test_what_is_not_finite_on_one_process_counts_on_none(tmp_path: Path) -> None:
    found = processes.run(spoil, processes=2, folder=tmp_path)
    for one in found:
        assert one["borders.0.feedback.second"].sum() == 12
        assert one["borders.0.feedback.weight"].isfinite().all()


def place(rank: int) -> list[int]:
    one = learner(labels=True)
    one.share_feedback()  # which is of no use to a pipeline, and does not stop it
    placement = balanced(one, *batch(0, labels=True, samples=8))
    pipeline = Pipeline(one, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), placement=placement)
    for losses in pipeline.train(batch(step, labels=True, samples=8) for step in range(3)):
        assert losses.isfinite().all()
    return list(placement.ranks)


def test_a_pipeline_decides_for_itself_what_its_processes_share(tmp_path: Path) -> None:
    first, second = processes.run(place, processes=2, folder=tmp_path)
    assert first == second


@pytest.mark.parametrize("group", ["world", 0, True, [0, 1]])
def test_other_groups_are_refused(group) -> None:
    with pytest.raises(TypeError, match=r"group is .*pass a process group, None for all processes, or False"):
        learner(labels=True).share_feedback(group)


def test_one_process_shares_with_nobody() -> None:
    alone, told = learner(labels=True), learner(labels=True)
    told.share_feedback()
    assert torch.equal(
        alone.backward(*batch(0, labels=True, samples=8)), told.backward(*batch(0, labels=True, samples=8))
    )
