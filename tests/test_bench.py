"""`bll bench`: baselines do the work they are named for, and what is reported is what can be measured by hand."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from blocklocal import BlockLocal
from blocklocal.lab.bench import profile, scaling
from blocklocal.lab.bench.baselines import IN_BLOCKS, WHOLE, Baseline, baseline
from blocklocal.lab.bench.measure import measure_all, ratio
from blocklocal.lab.bench.options import Options
from blocklocal.lab.bench.step_memory import allocated, measure
from blocklocal.lab.commands import bench
from blocklocal.lab.errors import UserError
from blocklocal.lab.models import build
from blocklocal.lab.training.rules import RULES
from blocklocal.memory import MemoryTracker

CPU = torch.device("cpu")
FAST = {"size": 8, "batch_size": 4, "steps": 1, "warmup": 0, "device": "cpu"}


def after_a_step(rule: str, model: nn.Module, **options: Any) -> Baseline:
    work = Options(**{**FAST, **options}).workload(model, batch_size=4, device=CPU)
    made = baseline(rule, work, blocks=2)
    made.step()
    return made


def trained(rule: str, model: nn.Module, **options: Any) -> list[torch.Tensor]:
    return list(after_a_step(rule, model, **options).module.parameters())


@pytest.mark.parametrize(
    ("rule", "same"),
    [("bp-checkpoint", "bp"), ("bp-accumulate", "bp"), ("bll-checkpoint", "bll"), ("bll-sum", "bll")],
)
def test_contenders_that_save_memory_learn_the_same(rule: str, same: str) -> None:
    model = build("cnn", channels=3, size=(8, 8), classes=10)
    if rule == "bp-accumulate":  # batch normalisation looks at each part alone
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))
    before = [parameter.clone() for parameter in model.parameters()]
    theirs, ours = trained(same, model), trained(rule, model)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, rtol=1e-5, atol=1e-6)
    moved = [not torch.equal(a, b) for a, b in zip(before, theirs, strict=False)]
    assert all(moved), "the step reaches every parameter"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "of a copy of the model"


@pytest.mark.parametrize("rule", [*RULES, *WHOLE, *IN_BLOCKS])
def test_every_rule_takes_steps(rule: str) -> None:
    model = build("cnn", channels=3, size=(8, 8), classes=10)
    made = after_a_step(rule, model, channels_last=True, dtype="bf16")
    assert all(tensor.isfinite().all() for tensor in made.state())
    assert made.blocks == (2 if rule.startswith(("bll", "pred")) else 1)
    assert made.rule == rule


def test_heads_are_those_of_the_option() -> None:
    model = build("cnn", channels=3, size=(8, 8), classes=10)
    heads = [name for name, _ in after_a_step("bll", model, head="linear").module.named_modules() if "head" in name]
    assert {name.rpartition(".")[2] for name in heads} == {"head", "linear"}


def test_memory_and_state_are_those_of_a_plain_loop() -> None:
    model = build("resnet20", channels=3, size=(8, 8), classes=10)
    work = Options(**FAST).workload(model, batch_size=4, device=CPU)
    found = measure_all({"bp": baseline("bp", work, blocks=1)}, device=CPU, rounds=2, warmup=1)["bp"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True)
    peak = 0
    for _ in range(2):
        with MemoryTracker() as tracker:
            cross_entropy(model(work.x), work.y).backward()
            optimizer.step()
            optimizer.zero_grad()
        peak = tracker.timeline.peak
    assert peak <= found.step_memory.alive <= peak + 4  # its loss is divided by the number of parts, which is 1
    assert peak <= found.allocated < 2 * peak  # with the workspace of its convolutions
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert found.state_bytes == 2 * parameters + sum(buffer.nbytes for buffer in model.buffers())
    assert len(found.seconds) == len(found.processor_seconds) == 2
    assert min(found.seconds) > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_resident_memory_grows_with_what_a_step_takes() -> None:
    pages, module = 64 * 2**20, nn.Linear(1, 1)

    def much() -> None:
        torch.ones(pages // 4)

    def growth(step: Callable[[], None]) -> int:
        found = measure(step, parts=[module]).resident_growth
        assert found is not None
        return found

    assert 0.95 * pages < growth(much) < 1.2 * pages
    assert growth(lambda: None) < pages / 4


def test_workspace_inside_an_operation_is_allocated_and_never_alive() -> None:
    """A convolution as a matrix product writes every patch of its input out, and frees them before it returns."""
    x, kernel = torch.ones(2, 4, 10, 10), torch.ones(3, 4, 3, 3)

    def step() -> None:
        torch.ops.aten.thnn_conv2d(x, kernel, (3, 3))

    output, patches = (4 * 2 * size * 8 * 8 for size in (3, 4 * 3 * 3))
    assert measure(step, parts=[]).alive == output
    assert allocated(step, device=CPU) == pytest.approx(output + patches, abs=256)


def test_ratio_is_taken_within_rounds() -> None:
    """A machine ten times slower in the second round is so for both."""
    assert ratio((2.0, 20.0, 3.0), (1.0, 10.0, 1.5)) == 2.0


def test_records_and_their_ratios(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "memory.png"
    options = Options(
        model="resnet20",
        rules="bll,bp-checkpoint,bll-sum",
        blocks="2,4",
        head="linear",
        size=16,
        batch_size=8,
        steps=1,
        warmup=0,
        device="cpu",
        plot=str(picture),
    )
    result = bench.bench(options)
    records = result["rules"]
    assert list(records) == ["bp", "bll/2", "bll/4", "bp-checkpoint", "bll-sum/2", "bll-sum/4"]
    bp = records["bp"]
    assert (bp["time_ratio"], bp["memory_ratio"], bp["total_ratio"]) == (1, 1, 1)
    for label, found in records.items():
        assert found["memory_ratio"] == found["memory_bytes"] / bp["memory_bytes"]
        assert found["time_ratio"] == pytest.approx(found["seconds_per_step"] / bp["seconds_per_step"])
        assert found["images_per_second"] == pytest.approx(8 / found["seconds_per_step"])
        assert found["seconds_min"] <= found["seconds_per_step"] <= found["seconds_max"]
        assert label == found["rule"] or label == f"{found['rule']}/{found['blocks']}"
    assert records["bll/4"]["memory_bytes"] < records["bll/2"]["memory_bytes"] < records["bll-sum/2"]["memory_bytes"]
    assert records["bp-checkpoint"]["memory_ratio"] < 0.6
    assert picture.read_bytes().startswith(b"\x89PNG")
    time, memory = bench.tables(result)
    assert time.row_count == memory.row_count == len(records)
    caption = " ".join(str(memory.caption).split())
    share = records["bll/4"]["memory_bytes"] / records["bll-sum/4"]["memory_bytes"]
    assert f"bll/4: {share:.3f} of the memory of one backward pass of the sum" in caption


def test_command_ends_with_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--model cnn --size 8 --batch-size 4 --steps 1 --warmup 0 --device cpu --rules bll --blocks 2 --json"
    bench.main(options.split())
    shown, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert "seconds per step" in shown
    record = json.loads(last)["rules"]["bll"]
    assert {"time_ratio", "memory_ratio", "seconds_per_step", "images_per_second"} <= set(record)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the profiler's own
def test_dearest_operations() -> None:
    """A product of large matrices beside one of small ones, three times."""
    large, small = torch.ones(256, 256), torch.ones(2, 3)

    def step() -> None:
        for _ in range(3):
            torch.mm(large, large)
            torch.exp(small)

    first, *rest = profile.most_expensive(step, device=CPU)
    assert (first["name"], first["calls"]) == ("aten::mm", 3)
    assert first["share"] > 0.5
    assert "aten::exp" in {found["name"] for found in rest}
    assert profile.table("bp", [first, *rest]).row_count == 1 + len(rest)


def test_exponents_of_powers() -> None:
    sizes = [1, 2, 4, 8]
    assert scaling.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)


def test_memory_grows_with_the_batch_and_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "UNITS", (1, 2))
    monkeypatch.setattr(scaling, "SHARES", (4, 1))
    options = Options(**{**FAST, "batch_size": 16}, model="cnn", blocks="2", head="linear")
    axes = scaling.scale(options)["axes"]
    assert axes["batch"]["bp"]["sizes"] == [4, 16]
    assert axes["depth"]["bll"]["sizes"] == [8, 14]
    for rule in scaling.RULES:
        by_batch, by_depth = axes["batch"][rule], axes["depth"][rule]
        for found in (by_batch, by_depth):
            assert found["memory_bytes"][0] < found["memory_bytes"][1]
            assert len(found["seconds_min"]) == 2
    assert scaling.tables({"axes": axes})[0].row_count == 4


def test_compilation_is_reported_apart() -> None:
    """A step that takes half a second once after it was compiled: none of it is in the steps that count."""
    delays: list[float] = []
    module = nn.Linear(1, 1)
    slow = Baseline(
        "slow",
        module,
        [],
        step=lambda: time.sleep(delays.pop() if delays else 0),
        parts=[module],
        compile=lambda: delays.append(0.5),
    )
    found = measure_all({"slow": slow}, device=CPU, rounds=3, warmup=0, compiled=True)["slow"]
    assert found.compile_seconds is not None
    assert found.compile_seconds == pytest.approx(0.5, abs=0.2)
    assert found.median < 0.2


@pytest.mark.parametrize("rule", ["bp", "bll"])
def test_compiled_steps_are_compiled(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of models that are an nn.Sequential, which nn.Module.compile passes over."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(BlockLocal.compile, "__kwdefaults__", {"backend": backend, "dynamic": None})
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))
    made = after_a_step(rule, model)
    made.compile()
    made.step()
    assert len(graphs) == made.blocks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": "bp,magic"}, "unknown rule 'magic': choose"),
        ({"blocks": "two"}, "--blocks 'two': write a number"),
        ({"blocks": "0,2"}, "--blocks 0 is out of range"),
        ({"steps": 0}, "--steps 0 is out of range"),
        ({"warmup": -1}, "--warmup -1 is out of range: 0 or more"),
        ({"accumulate": 3}, "--accumulate 3 does not divide the batch of 4 images"),
        ({"blocks": "99"}, "rule 'bll': blocks=99: "),
        ({"head": "tail"}, "head='tail' is unknown"),
    ],
)
def test_unusable_options(arguments: dict[str, Any], message: str) -> None:
    options = Options(**{**FAST, "model": "cnn", **arguments})
    with pytest.raises(UserError) as caught:
        bench.bench(options)
    assert message in str(caught.value)
