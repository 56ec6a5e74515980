"""The values that one block begins with, drawn without memory for the others."""

import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from torch import nn

from blocklocal.lab import models
from blocklocal.lab.errors import UserError
from blocklocal.lab.one_block import alone
from blocklocal.lab.one_block.folder import weights_of
from blocklocal.lab.one_block.initial import Unsuited, on_meta, values_of
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.outline import task_without_data
from blocklocal.lab.tasks.task import Task

CUTS = {
    "mlp": ("layer1", "layer2"),
    "cnn": ("layer1", "layer2"),
    "resnet20": ("layer1", "layer2"),
    "vit": ("blocks.1", "blocks.3"),
    "gpt-tiny": ("blocks.0", "blocks.2"),
}
CPU = torch.device("cpu")

LARGE = """
import resource, sys, torch
from torch import nn

def large(*, channels, size, classes):
    n = channels * size[0] * size[1]
    layers = [nn.Linear(2048, 2048) for _ in range(12)]
    return nn.Sequential(nn.Flatten(), nn.Linear(n, 2048), *layers, nn.Linear(2048, classes))

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

if __name__ == "__main__":
    from blocklocal.lab.one_block.alone import prepare_alone
    from blocklocal.lab.settings import Settings
    from blocklocal.lab.tasks.outline import task_without_data
    settings = Settings(data="none", model="large_net:large", at=("4", "6"), threads=1)
    facts = {"shape": [1, 4, 4], "classes": ["a", "b"], "training_images": 100, "test_images": 10}
    task = task_without_data(settings, facts)
    small = Settings(data="none", model="mlp", at=("layer1", "layer2"), threads=1)
    prepare_alone(small, 1, task=task_without_data(small, facts), device=torch.device("cpu"))
    before = peak()
    experiment = prepare_alone(settings, 1, task=task, device=torch.device("cpu"))
    own = sum(p.numel() * 4 for p in experiment.learner.block_parameters(1)) / 2**20
    print(own, peak() - before)
"""


def task_of(model: str) -> Task:
    text = model == "gpt-tiny"
    settings = Settings(data="text:none" if text else "none", model=model, at=CUTS.get(model, ("0", "1")))
    counts = {f"{use}_{unit}": 100 for use in ("training", "test") for unit in ("images", "windows")}
    return task_without_data(settings, {"shape": [3, 32, 32], "classes": list("abcdefg"), "tokens": 33} | counts)


@pytest.mark.parametrize("model", CUTS)
def test_a_block_begins_as_in_a_whole_model(model):
    task = task_of(model)
    for k in range(3):
        own = alone._begin_alone(task, k, device=CPU).learner
        after = torch.rand(1)
        whole = alone._begin_whole(task, k, device=CPU).learner
        assert torch.equal(after, torch.rand(1))
        found, expected = weights_of(own, k), weights_of(whole, k)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        assert sum(not parameter.is_meta for parameter in own.parameters()) == len(own.block_parameters(k))


class Copying(nn.Module):
    """Its second layer begins as a copy of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.load_state_dict(self.first.state_dict())


class Twice(nn.Module):
    """Draws its weights twice, and counts on what it has drawn last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        for layer in (self.first, self.second):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            layer.bias.data[1:].fill_(3.0)


def test_only_what_is_wanted_has_memory():
    _, numbers = on_meta(Twice)
    for wanted in ("first", "second"):
        torch.manual_seed(1)
        found = values_of(Twice, wanted={f"{wanted}.weight", f"{wanted}.bias"}, numbers=numbers)
        after = torch.rand(1)
        torch.manual_seed(1)
        expected = Twice().state_dict()
        assert found.keys() == {f"{wanted}.weight", f"{wanted}.bias"}
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert torch.equal(after, torch.rand(1))


def test_values_that_come_from_another_block_are_not_lost():
    _, numbers = on_meta(Copying)
    assert set(values_of(Copying, wanted={"first.weight"}, numbers=numbers)) == {"first.weight"}
    with pytest.raises((Unsuited, RuntimeError)):  # load_state_dict makes it a RuntimeError
        values_of(Copying, wanted={"second.weight"}, numbers=numbers)


class Swallowing(nn.Module):
    """Goes on where a value cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        with suppress(Exception):
            self.second.weight.data.copy_(self.first.weight)


def test_a_constructor_that_goes_on_is_not_believed():
    _, numbers = on_meta(Swallowing)
    with pytest.raises(Unsuited):
        values_of(Swallowing, wanted={"second.weight"}, numbers=numbers)


class Reading(nn.Module):
    """Its constructor reads a weight, which is not possible on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = self.first.weight[0, 0].item()


def test_a_constructor_that_does_not_run_on_meta():
    with pytest.raises(RuntimeError):
        on_meta(Reading)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_other_blocks_are_never_in_memory(tmp_path):
    (tmp_path / "large_net.py").write_text(LARGE)
    done = subprocess.run([sys.executable, "large_net.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    own, grown = map(float, done.stdout.split())
    assert 30 < own < 40  # two layers of 16 MiB, of 12
    assert grown < own + 60  # one layer at a time while it is drawn, and code that is loaded


def test_a_model_that_is_not_suited_begins_the_same(monkeypatch):
    def reading(*, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        first, second = nn.Linear(channels * size[0] * size[1], 8), nn.Linear(8, 8)
        second.weight.data.mul_(first.weight[0, 0].item())
        return nn.Sequential(
            nn.Sequential(nn.Flatten(), first), nn.Sequential(nn.ReLU(), second), nn.Linear(8, classes)
        )

    monkeypatch.setitem(models.MODELS, "reading", reading)
    task = task_of("reading")
    with pytest.raises(UserError, match="meta tensors"):
        alone._begin_alone(task, 1, device=CPU)
    learner = alone.prepare_alone(task.settings, 1, task=task, device=CPU).learner
    torch.manual_seed(task.settings.seed)
    expected = reading(channels=3, size=(32, 32), classes=7).get_submodule("1.1").state_dict()
    assert torch.equal(weights_of(learner, 1)["blocks.1.1.1.weight"], expected["weight"])
    assert sum(not parameter.is_meta for parameter in learner.parameters()) == len(learner.block_parameters(1))
