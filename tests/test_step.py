"""What a step does beside the blocks' own layers: few operations, no wait for the device, nothing that stays."""

import gc
import json
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import blocklocal as bll
from blocklocal.families import Family
from blocklocal.memory import MemoryTracker

CLASSES = 4
CLOSED_FORM, GRADIENT = bll.ClosedFormFeedback(), bll.GradientFeedback()
EVERYTHING = bll.BLL + bll.Predictive("linear") + bll.Predictive("conv") + bll.Predictive("evidence") + bll.Similarity()


def setting(
    loss=bll.BLL, *, classes: int = CLASSES, feedback=CLOSED_FORM, memory_format=torch.contiguous_format
) -> tuple[bll.BlockLocal, list[SGD], Tensor, Tensor]:
    torch.manual_seed(0)
    units = [zoo.Residual(8, 8), zoo.Residual(8, 16, stride=2), zoo.Residual(16, 16)]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)
    )
    x, y = torch.randn(8, 3, 8, 8).contiguous(memory_format=memory_format), torch.randint(classes, (8,))
    learner = bll.BlockLocal(model, at=["1", "2"], classes=classes, example=x, loss=loss, feedback=feedback)
    learner.to(memory_format=memory_format)  # type: ignore[call-overload]
    return learner, [SGD(learner.block_parameters(k), lr=0.1, momentum=0.9) for k in range(3)], x, y


def status(key: str) -> int:
    """Bytes, of Linux; 0 elsewhere."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


class Operations(TorchDispatchMode):
    """The operations that run while it is active, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("feedback", [CLOSED_FORM, GRADIENT], ids=["closed form", "gradient"])
def test_a_step_reads_no_value(feedback, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors have none: a step that asked for one would raise, as .item() does."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device has none
    monkeypatch.setattr(torch.Tensor, "is_meta", False)  # for which a learner refuses them
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros(1, device="meta").item()
    learner, _, x, y = setting(EVERYTHING, feedback=feedback)
    learner.to("meta")
    optimizers = [SGD(learner.block_parameters(k), lr=0.1, momentum=0.9) for k in range(3)]
    assert learner.backward(x.to("meta"), y.to("meta"), optimizers=optimizers).shape == (3,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_a_step_waits_for_no_gpu() -> None:
    learner, _, x, y = setting(EVERYTHING)
    learner.cuda()
    optimizers = [SGD(learner.block_parameters(k), lr=0.1, momentum=0.9) for k in range(3)]
    x, y = x.cuda(), y.cuda()
    learner.backward(x, y, optimizers=optimizers)
    torch.cuda.set_sync_debug_mode("error")
    try:
        learner.backward(x, y, optimizers=optimizers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_operations_of_a_border_are_few_and_as_many_for_any_number_of_classes() -> None:
    counts = []
    for classes in (2, 50):
        learner, _, _, _ = setting(bll.BLL_PAPER, classes=classes)
        h, y = torch.randn(8, 8, 8, 8, requires_grad=True), torch.arange(8) % 2
        with Operations() as operations:
            learner.borders[0](learner._border(0).message(h), y).backward()
        counts.append(len(operations.names))
    assert counts[0] == counts[1] < 64


@pytest.mark.parametrize("fixed_posterior", [False, True])
def test_the_gaussians_shortcut_is_what_holds_for_all_families(fixed_posterior: bool) -> None:
    torch.manual_seed(0)
    family = bll.Gaussian(0.7)
    alpha, beta = torch.randn(2, 5, 6, dtype=torch.float64).requires_grad_().unbind()
    short = family.variational_loss(alpha, beta, fixed_posterior=fixed_posterior)
    long = Family.variational_loss(family, alpha, beta, fixed_posterior=fixed_posterior)
    assert_close(short, long)
    weights = torch.rand(5, 6, dtype=torch.float64)
    assert_close(torch.autograd.grad(short, alpha, weights), torch.autograd.grad(long, alpha, weights))


def test_the_gradient_of_the_spatial_mean_takes_no_memory() -> None:
    positions = torch.randn(2, 3, 64, requires_grad=True)
    mean = bll.spatial_mean(positions)
    assert_close(mean, positions.mean(2))
    (gradient,) = torch.autograd.grad(mean.sum(), positions)
    assert_close(gradient, torch.full_like(positions, 1 / 64))
    assert gradient.untyped_storage().nbytes() == 2 * 3 * 4


@pytest.mark.parametrize("stepped_by", ["backward", "caller"])
def test_cast_weights_do_not_outlive_a_step_in_one_context_for_all(stepped_by: str) -> None:
    """One autocast context around many steps, and around a look at the predictions, changes no weight."""

    def train(*, one_context: bool) -> bll.BlockLocal:
        torch.manual_seed(0)
        learner = bll.BlockLocal(
            [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)], classes=3, example=torch.randn(2, 8)
        )
        optimizers = [SGD(learner.block_parameters(k), lr=0.5) for k in range(3)]
        x, y = torch.randn(16, 8), torch.arange(16) % 3
        with torch.autocast("cpu", torch.bfloat16) if one_context else nullcontext():
            for _ in range(4):
                with torch.autocast("cpu", torch.bfloat16):
                    learner.predict(x)
                    learner.backward(x, y, optimizers=optimizers if stepped_by == "backward" else None)
                if stepped_by == "caller":
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
        return learner

    separate, together = train(one_context=False).state_dict(), train(one_context=True).state_dict()
    assert [name for name in separate if not torch.equal(separate[name], together[name])] == []


def test_nothing_is_copied_at_a_border() -> None:
    learner, _, x, y = setting()
    pointers: list[tuple[int, int]] = []
    for block in learner.blocks:
        block.register_forward_hook(
            lambda _, inputs, output: pointers.append((inputs[0].data_ptr(), output.data_ptr()))
        )
    learner.backward(x, y)
    assert [given for given, _ in pointers] == [x.data_ptr(), *(handed_on for _, handed_on in pointers[:-1])]


def test_channels_last_is_kept_through_the_chain() -> None:
    learner, _, h, y = setting(memory_format=torch.channels_last)
    for k in range(2):
        _, h = learner.local(k, h, y)
        assert h.is_contiguous(memory_format=torch.channels_last)
        assert not h.is_contiguous()


def test_nothing_is_left_after_a_thousand_steps() -> None:
    model, x = zoo.perceptron()
    learner = bll.BlockLocal(model, at=["1", "4"], classes=CLASSES, example=x)
    optimizers = [SGD(learner.block_parameters(k), lr=0.1, momentum=0.9) for k in range(3)]
    y = torch.arange(len(x)) % CLASSES
    learner.backward(x, y, optimizers=optimizers)
    gc.collect()
    gc.disable()
    try:
        objects, resident = len(gc.get_objects()), status("VmRSS")
        for _ in range(1000):
            learner.backward(x, y, optimizers=optimizers)
        assert len(gc.get_objects()) < objects + 1000  # not one object per step
        assert status("VmRSS") < resident + 1000 * 4096  # nor one page
        with MemoryTracker() as tracker:
            for _ in range(10):
                learner.backward(x, y, optimizers=optimizers)
                assert tracker.alive == 0
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore::UserWarning")  # the profiler's own
def test_the_peak_is_what_the_allocator_saw(tmp_path: Path) -> None:
    """Against the trace of all allocations, which holds the workspace inside operations too."""
    model, x = zoo.encoder()
    learner = bll.BlockLocal(model, blocks=2, classes=CLASSES, example=x)
    x, y = x.repeat(16, *[1] * (x.dim() - 1)), torch.arange(16 * len(x)) % CLASSES

    def step() -> None:
        learner.backward(x, y)
        learner.zero_grad()

    step()
    with MemoryTracker() as tracker:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    changes.sort(key=lambda change: change[0])
    peak = max(accumulate(change for _, change in changes))
    assert 0.95 * peak < tracker.timeline.peak <= 1.001 * peak
