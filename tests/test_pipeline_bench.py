"""The pipeline benchmark: every baseline trains, and its numbers are those of the work that it is given."""

import json

import pytest
import torch

from blocklocal.lab.cli import main
from blocklocal.lab.errors import UserError
from blocklocal.lab.pipeline_bench import bench
from blocklocal.lab.pipeline_bench.workloads import CHAINS, Sleep

ALONE = ["backpropagation, alone", "block-local, alone", "block-local, alone in each"]
TOGETHER = ["block-local", "GPipe, M=2", "1F1B, M=2", "data parallel"]


def test_all_contenders_are_measured_and_the_pipelines_simulated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    options = ["--model=devices", "--rounds=1", "--minibatches=2", "--microbatches", "2", "--json"]
    assert main(["bench", "--pipeline", *options]) == 0
    shown, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    result = json.loads(last)
    assert list(result["seconds"]) == ALONE + TOGETHER
    assert list(result["simulated"]) == TOGETHER
    # two devices that sleep 60 ms a minibatch: no clock can make one alone faster than 120 ms, two than 60 ms
    assert all(min(result["seconds"][name]) >= 0.12 for name in ALONE)
    assert all(min(result["seconds"][name]) >= 0.06 for name in TOGETHER)
    assert result["simulated"]["block-local"] >= 0.06
    assert all(result["simulated"][name] >= 0.06 * 3 / 2 for name in TOGETHER[1:3])
    assert result["simulated"]["data parallel"] >= 0.06
    assert all(value > 0 for value in list(result["link"].values())[:2])
    assert all(0 <= share < 1 for share in result["waiting"])
    assert all(name in shown for name in TOGETHER)


@pytest.mark.parametrize("name", ["mlp", "cnn", "devices"])
def test_chains_are_chains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    chain = CHAINS[name](4)
    h = chain.x
    for block in chain.blocks:
        h = block(h)
    assert len(chain.blocks) == 4
    assert h.shape == (len(chain.y), 10)


def test_a_device_sleeps_for_the_rows_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    h = torch.randn(8, 3, requires_grad=True)
    Sleep.apply(h, 0.25, 0.5).sum().backward()
    assert slept == [2.0, 4.0]
    assert h.grad is not None
    assert torch.equal(h.grad, torch.ones(8, 3))


def test_more_processes_than_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="2 to 4"):
        bench.main(["--model", "cnn", "--processes", "5"])
