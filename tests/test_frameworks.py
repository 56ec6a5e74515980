"""The examples with other tools, each against a plain loop or another computation.

`make frameworks` installs the tools. Where a tool is missing its test is skipped and says so.
"""

from __future__ import annotations

import copy
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import blocklocal as bll

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # those of the tools themselves
]


def example(name: str, *tools: str) -> dict[str, Any]:
    """What an example defines, unless a tool that it needs is missing."""
    for tool in tools:
        pytest.importorskip(tool, reason=f"{tool} is not installed: make frameworks installs it")
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


class Record:
    """A copy of a learner as it was before its first batch, and the batches that it then learnt from."""

    learner: Any = None

    def __init__(self) -> None:
        self.batches: list[tuple[Any, Tensor]] = []


@contextmanager
def recorded(learner_of: type, method: str) -> Iterator[Record]:
    record, original = Record(), getattr(learner_of, method)

    def call(learner, x, y, **options):
        if record.learner is None:
            record.learner = copy.deepcopy(learner)
        record.batches.append((copy.deepcopy(x), y.clone()))
        return original(learner, x, y, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner_of, method, call)
        yield record


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """To the bit: parameters and buffers."""
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_lightning_with_automatic_optimisation(tmp_path: Path) -> None:
    main = example("lightning_module", "lightning")["main"]
    with recorded(bll.BlockLocal, "forward") as record:
        assert main(root=tmp_path) > 0.9
    learner = record.learner
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
    assert len(record.batches) == 12 * 23
    for x, y in record.batches:
        learner.backward(x, y)
        optimizer.step()
        optimizer.zero_grad()
    trained = torch.load(next(tmp_path.glob("checkpoints/*.ckpt")), weights_only=True)["state_dict"]
    for name, value in learner.state_dict().items():
        assert torch.equal(trained[f"learner.{name}"], value), name


def test_lightning_with_manual_optimisation(tmp_path: Path) -> None:
    module = example("lightning_manual", "lightning")
    with recorded(bll.BlockLocal, "backward") as record:
        whole = module["main"](epochs=2, root=tmp_path / "whole").learner
    plain = record.learner
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    for x, y in record.batches:
        plain.backward(x, y)
        nn.utils.clip_grad_norm_(plain.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert_same(plain, whole)
    module["main"](epochs=1, root=tmp_path / "half")
    resumed = module["main"](epochs=2, root=tmp_path / "half", checkpoint=tmp_path / "half" / "last.ckpt")
    assert_same(resumed.learner, whole)
    loaded = module["ManualModule"].load_from_checkpoint(tmp_path / "whole" / "last.ckpt")
    assert_same(loaded.learner, whole)


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    module = example("transformers_trainer", "transformers", "accelerate")
    main = module["main"]
    settings = {"max_steps": 10, "save_steps": 5, "logging_steps": 2, "gradient_accumulation_steps": 2}
    with recorded(bll.Hooked, "backward") as record:
        trainer = main(root=str(tmp_path / "whole"), **settings)
    plain = record.learner
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    losses = []
    for i, (x, y) in enumerate(record.batches):
        losses.append(plain.backward(x, y, scale=0.5))
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    assert_same(plain, trainer.learner)

    logged = [entry for entry in trainer.state.log_history if "loss_block0" in entry]
    assert [[entry[f"loss_block{k}"] for k in range(3)] for entry in logged] == [
        losses[i].tolist() for i in range(20) if i // 2 % 2 == 0
    ]
    loaded = type(trainer.model).from_pretrained(tmp_path / "whole" / "model")
    assert_same(loaded, trainer.model)

    half = main(root=str(tmp_path / "half"), **(settings | {"max_steps": 1}))
    half.args.max_steps, half.lr_scheduler = 10, None  # made anew, for 10 steps
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    half.learner.borders.load_state_dict(torch.load(checkpoint / "borders.pt"))
    torch.manual_seed(half.args.seed)  # as when it was made: the order of the data is drawn from it
    half.train(resume_from_checkpoint=str(checkpoint))
    assert_same(half.learner, trainer.learner)


def test_accelerate(tmp_path: Path) -> None:
    import_of = example("accelerate_loop", "accelerate")
    with recorded(bll.BlockLocal, "forward") as record:
        trained = import_of["main"](epochs=2, root=str(tmp_path))
    plain = record.learner
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    for epoch in range(2):
        for i, (x, y) in enumerate(record.batches[45 * epoch : 45 * (epoch + 1)]):
            plain.backward(x, y, scale=0.5)
            if i % 2 or i == 44:
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
    assert_same(plain, trained)

    accelerate = pytest.importorskip("accelerate")
    other = copy.deepcopy(record.learner)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9))[0]
    accelerator.load_state(str(tmp_path))
    assert_same(prepared, trained)


def test_tensorboard(tmp_path: Path) -> None:
    history = example("tensorboard_log", "tensorboard")["main"](steps=60, root=str(tmp_path))
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    for k in range(3):
        found = [event.value for event in events.Scalars(f"loss/block{k}")]
        assert_close(found, [losses[k] for losses in history], rtol=1e-6, atol=0)
    assert [event.step for event in events.Scalars("border1/agreement")] == [0, 50]


def test_optimisation() -> None:
    """The same from the local losses, one optimizer step after another, with the formulas written out."""
    main = example("optimisation")["main"]
    with recorded(bll.BlockLocal, "backward") as record:
        learner, average, *_ = main(steps=30)
    plain = record.learner
    mean = [parameter.detach().clone() for parameter in plain.parameters()]
    optimizers = []
    for k in range(4):
        parameters = plain.block_parameters(k)
        groups = [{"params": [p for p in parameters if (p.dim() > 1) is decays], "weight_decay": decay}
                  for decays, decay in ((True, 0.05), (False, 0.0))]  # fmt: skip
        optimizers.append(torch.optim.AdamW(groups))
    schedules = [torch.optim.lr_scheduler.OneCycleLR(one, max_lr=0.01, total_steps=30) for one in optimizers]
    for step, (x, y) in enumerate(record.batches):
        with torch.autocast("cpu", torch.bfloat16):
            losses = plain(x, y)
        for k, loss in enumerate(losses):
            (loss * 1024).backward()
            gradients = [p.grad for p in plain.block_parameters(k) if p.grad is not None]
            for gradient in gradients:
                gradient /= 1024
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            for gradient in gradients:
                gradient *= (1 / (norm + 1e-6)).clamp(max=1)
            optimizers[k].step()
            optimizers[k].zero_grad()
            schedules[k].step()
        for old, new in zip(mean, plain.parameters(), strict=True):
            old.copy_(new) if step == 0 else old.lerp_(new, 0.01)
    assert_same(plain.eval(), learner)
    for one, other in zip(mean, average.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_lora() -> None:
    """Base weights stand still; an adapter's first gradient is the block-local gradient of its weight, projected."""
    module = example("lora", "peft")
    pretrained, learner, x, y = module["main"](steps=40)
    own = learner.model.state_dict()
    for name, value in pretrained.items():
        frozen = (
            name if name in own else name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        )
        assert torch.equal(own[frozen], value), name
    for name in ("first", "second", "classifier"):
        assert own[f"{name}.lora_B.default.weight"].abs().max() > 0

    torch.manual_seed(1)
    plain = module["Network"]()
    plain.load_state_dict(pretrained)
    full = bll.Hooked(plain, at=["stem", "first"], classes=10, example=x[:4])
    peft = pytest.importorskip("peft")
    adapted = module["Network"]()
    adapted.load_state_dict(pretrained)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second", "classifier"])
    low = bll.Hooked(peft.inject_adapter_in_model(config, adapted), at=["stem", "first"], classes=10, example=x[:4])
    low.borders.load_state_dict(full.borders.state_dict())
    full.backward(x[:64], y[:64])
    low.backward(x[:64], y[:64])
    for name in ("first", "second", "classifier"):
        weight, layer = plain.get_submodule(name).weight, adapted.get_submodule(name)
        assert isinstance(weight, nn.Parameter)
        down, up = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
        assert weight.grad is not None
        assert_close(up.grad, 8 / 4 * weight.grad @ down.T)


@pytest.mark.parametrize("learner_of", [bll.BlockLocal, bll.Hooked])
def test_exports(learner_of: type, tmp_path: Path) -> None:
    found = example("export_exits", "onnx", "onnxscript", "onnxruntime")["main"](
        root=str(tmp_path), steps=20, learner_of=learner_of
    )
    for exit in (0, 1, None, "all"):
        assert found[exit]["torch.export"] < 1e-6
        assert found[exit]["onnx"] < 1e-4
    bytes = [found[exit]["bytes"] for exit in (0, 1, "all")]
    parameters = [found[exit]["parameters"] for exit in (0, 1, "all")]
    assert parameters == sorted(parameters)
    assert bytes == sorted(bytes)
