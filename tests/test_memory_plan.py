"""Memory predicted on the meta device, against formulas and against what a step needs."""

import json

import pytest
import torch
from torch import nn

from blocklocal.lab.cli import main
from blocklocal.lab.models import build
from blocklocal.memory import MemoryTracker

MODELS = {
    "mlp": ["mlp", "--channels=1", "--size=8"],
    "resnet8": ["resnet8", "--at", "layer1", "layer2"],
    "cnn": ["cnn", "--size=16"],
    "text": ["gpt-tiny", "--tokens=30", "--context=16"],
}
STATES = {"sgd": 1, "adamw": 2, "schedulefree": 2}
ATTENTION = 0.2  # share by which the fused attention of a CPU may need less than that of the meta device


def plan(capsys, *args: str) -> dict[str, list[dict]]:
    capsys.readouterr()
    assert main(["plan-memory", *args]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "optimizer"), [("mlp", "schedulefree"), ("resnet8", "adamw"), ("cnn", "sgd"), ("text", "adamw")]
)
def test_prediction_and_measurement_agree(capsys, name, optimizer):
    found = plan(capsys, *MODELS[name], f"--optimizer={optimizer}", "--batch-size=8", "--measure", "--device=cpu")
    assert len(found["predicted"]) == len(found["measured"])
    for predicted, measured in zip(found["predicted"], found["measured"], strict=True):
        for part in ("way", "block", "weights", "gradients", "state"):
            assert predicted[part] == measured[part]
        off = ATTENTION if name == "text" else 0.01
        assert predicted["total"] == pytest.approx(measured["total"], rel=off)
        moments = STATES[optimizer] * predicted["gradients"]
        if predicted["way"] != "blocks":
            assert moments <= predicted["state"] < moments + 1000  # and a count of steps for each tensor


def test_a_whole_step_is_measured_as_in_a_plain_loop(capsys):
    found = plan(capsys, "resnet8", "--at", "layer1", "layer2", "--batch-size=8", "--accumulate=1")
    model = build("resnet8", channels=3, size=(32, 32), classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))

    def step() -> None:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with MemoryTracker() as tracker:
        step()
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    (backprop, accumulated) = (found["predicted"][i] for i in (0, 2))
    assert (backprop["weights"], backprop["gradients"], backprop["state"]) == (weights, gradients, gradients)
    activations = tracker.timeline.peak - gradients + x.nbytes + y.nbytes
    assert backprop["activations"] == pytest.approx(activations, rel=0.01)
    assert accumulated["total"] == backprop["total"]


def test_blocks_in_memory_are_the_sum_of_blocks_alone(capsys):
    found = plan(capsys, *MODELS["resnet8"], "--batch-size=8")["predicted"]
    together, offloaded, alone = found[3], found[4], found[5:]
    assert [need["block"] for need in alone] == [0, 1, 2]
    for part in ("weights", "state"):
        assert together[part] == sum(need[part] for need in alone)
    assert offloaded["total"] == max(need["total"] for need in alone)
    most = max(alone, key=lambda need: need["gradients"] + need["activations"])
    assert (together["gradients"], together["activations"]) == (most["gradients"], most["activations"])


def test_nothing_is_allocated_where_the_cuts_are_named(capsys, monkeypatch):
    devices = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (devices.append(x.device.type), forward(self, x))[1])
    plan(capsys, *MODELS["text"])
    assert set(devices) == {"meta"}


def test_wrong_options(capsys):
    for args, words in (
        (["mlp", "--accumulate=3"], "--accumulate 3 does not divide --batch-size 32"),
        (["gpt-tiny"], "model 'gpt-tiny' is for text: add --tokens"),
        (["mlp", "--context=8"], "--context has an effect only with --tokens"),
        (["mlp", "--at", "nothing"], "nothing"),
    ):
        capsys.readouterr()
        assert main(["plan-memory", *args]) == 2
        assert words in capsys.readouterr().err
