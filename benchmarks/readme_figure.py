"""The figure of README.md: memory over one training step, and test accuracy over epochs, of blocks and backpropagation.

Run: python benchmarks/readme_figure.py  (a minute on a CPU, needs the `lab` extra; writes docs/overview.png)

Memory is measured here, as `bll bench` measures it. Accuracy is read from benchmarks/runs, three seeds on one GPU, see
docs/accuracy.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blocklocal.lab import models
from blocklocal.lab.bench import step_memory
from blocklocal.lab.bench.baselines import baseline
from blocklocal.lab.bench.options import Options
from blocklocal.lab.bench.step_memory import StepMemory
from blocklocal.lab.report.figures import STYLE

ROOT = Path(__file__).parents[1]
GREY, BLUE, ORANGE = "#8a8a8a", "#1f77b4", "#d95f02"


def memory_of(rule: str, *, model: str = "resnet20", images: int = 128, blocks: int = 4) -> StepMemory:
    """One step after the first, in which the optimizer makes its state."""
    torch.manual_seed(0)
    options = Options(model=model, batch_size=images)
    network = models.build(model, channels=3, size=(32, 32), classes=10)
    work = options.workload(network, batch_size=images, device=torch.device("cpu"))
    made = baseline(rule, work, blocks=blocks)
    made.step()
    return step_memory.measure(made.step, parts=made.parts)


def accuracies(runs: Path, pattern: str, key: str) -> list[list[float]]:
    """Of each run, the accuracy in % after every epoch: of the last exit, or of all of them combined."""
    found = []
    for file in sorted(runs.glob(f"{pattern}/metrics.jsonl")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        values = [record[key] for record in records]
        found.append([100 * (value[-1] if isinstance(value, list) else value) for value in values])
    return found


def draw_memory(axes: Axes, label: str, measured: StepMemory, *, colour: str, alpha: float) -> None:
    timeline = measured.timeline
    shares = [seconds / timeline.seconds[-1] for seconds in timeline.seconds]
    mebibytes = [size / 2**20 for size in timeline.bytes]
    peak = timeline.peak / 2**20
    axes.fill_between(
        shares, mebibytes, step="post", color=colour, alpha=alpha, linewidth=0, label=f"{label}: {peak:,.0f} MiB"
    )
    axes.axhline(peak, color=colour, linewidth=1, linestyle=":", marker="")


def draw_accuracy(axes: Axes, label: str, runs: list[list[float]], *, colour: str, style: str = "-") -> None:
    """The mean over seeds, and their range."""
    columns = list(zip(*runs, strict=True))
    epochs = range(1, len(columns) + 1)
    means = [sum(column) / len(column) for column in columns]
    axes.fill_between(
        epochs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, linewidth=0
    )
    axes.plot(epochs, means, style, color=colour, label=f"{label}: {means[-1]:.1f} %")


@matplotlib.rc_context(STYLE)
def main(file: Path = ROOT / "docs/overview.png") -> None:
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    memory, accuracy = figure.subplots(1, 2)
    draw_memory(memory, "backpropagation", memory_of("bp"), colour=GREY, alpha=0.55)
    draw_memory(memory, "4 blocks", memory_of("bll"), colour=BLUE, alpha=0.9)
    memory.set(
        title="Memory of one training step, ResNet-20", xlabel="share of the step", ylabel="MiB alive", xlim=(0, 1)
    )
    memory.set_axisbelow(True)
    memory.set_ylim(0, 245)  # room for the legend
    memory.legend(loc="upper right")

    runs = ROOT / "benchmarks/runs"
    blocks = "gpu-cifar10-resnet20-k4-seed*"
    key = "test_accuracy"
    draw_accuracy(accuracy, "backpropagation", accuracies(runs, "gpu-cifar10-resnet20-bp-seed*", key), colour=GREY)
    draw_accuracy(accuracy, "4 blocks, last exit", accuracies(runs, blocks, key), colour=BLUE)
    draw_accuracy(accuracy, "4 blocks, all exits", accuracies(runs, blocks, f"{key}_all"), colour=ORANGE, style="--")
    accuracy.set(title="Test accuracy, ResNet-20 on CIFAR-10", xlabel="epoch", ylabel="%")
    accuracy.legend(loc="lower right")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
