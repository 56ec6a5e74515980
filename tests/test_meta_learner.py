"""On the meta device a learner can be built, and is given memory later; whatever needs values is refused in a line."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import blocklocal as bll

CLASSES = 3
X, Y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])


def network(device: str) -> nn.Sequential:
    with torch.device(device):
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))


def learner(device: str, **cuts) -> bll.BlockLocal:
    return bll.BlockLocal(network(device), classes=CLASSES, example=X.to(device), **(cuts or {"at": ["1"]}))


@pytest.mark.parametrize("loss", [bll.BLL, bll.PRED_SIM, bll.Predictive("evidence")], ids=str)
def test_built_on_meta_and_given_memory(loss) -> None:
    built: list[Callable[[str], bll.BlockLocal]] = [
        lambda device: bll.BlockLocal(network(device), at=["1"], classes=CLASSES, example=X.to(device), loss=loss),
        lambda device: bll.BlockLocal(list(network(device)), classes=CLASSES, example=X.to(device), loss=loss),
    ]
    for build in built:
        real, emptied, assigned = build("cpu"), build("meta"), build("meta")
        assert all(tensor.is_meta for tensor in (*emptied.parameters(), *emptied.buffers()))
        emptied.to_empty(device="cpu").load_state_dict(real.state_dict())
        assigned.load_state_dict(copy.deepcopy(real.state_dict()), assign=True)
        losses = [ours.backward(X, Y) for ours in (real, emptied, assigned)]
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[0], losses[2])
        for ours in (emptied, assigned):
            assert torch.equal(ours.eval().predict(X), ours.model(X))


PASSES: dict[str, Callable[[bll.BlockLocal, Tensor, Tensor], object]] = {
    "forward": lambda ours, x, y: ours(x, y),
    "backward": lambda ours, x, y: ours.backward(x, y),
    "local": lambda ours, x, y: ours.local(0, x, y),
    "exits": lambda ours, x, y: ours.exits(x),
    "predict": lambda ours, x, y: ours.predict(x),
    "first exit": lambda ours, x, y: ours.predict(x, exit=0),
    "all exits": lambda ours, x, y: ours.predict(x, exit="all"),
    "confident exit": lambda ours, x, y: ours.predict(x, confidence=0.5),
    "diagnose": lambda ours, x, y: ours.diagnose(x, y),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("cuts", [{"at": ["1"]}, {"blocks": 1}], ids=str)
def test_passes_on_meta_are_refused(name: str, cuts: dict) -> None:
    if name == "diagnose" and "blocks" in cuts:
        return  # there is no border to look at
    run, on_meta, real = PASSES[name], learner("meta", **cuts), learner("cpu", **cuts)
    before = {key: value.clone() for key, value in real.state_dict().items()}
    with pytest.raises(ValueError, match=r"block 0 is on the meta device, where nothing is computed: give it memory"):
        run(on_meta, X, Y)
    for ours in (on_meta, real):
        with pytest.raises(ValueError, match=r"(x|y) is on the meta device, where tensors have no values"):
            run(ours, X.to("meta"), Y.to("meta"))
    if name in ("forward", "backward", "diagnose"):
        with pytest.raises(ValueError, match=r"y is on the meta device"):
            run(real, X, Y.to("meta"))
    assert all(torch.equal(value, before[key]) for key, value in real.state_dict().items())


@pytest.mark.parametrize(("model", "example"), [("meta", "cpu"), ("cpu", "meta")])
def test_a_model_and_its_example_are_on_meta_together(model: str, example: str) -> None:
    is_or_not = "is" if model == "meta" else "is not"
    several: list[dict] = [{"at": ["1"]}, {}]
    for cuts in several:
        with pytest.raises(ValueError, match=f"on the device {example}, but the model {is_or_not} on the meta device"):
            bll.BlockLocal(network(model), classes=CLASSES, example=X.to(example), **cuts)


@pytest.mark.parametrize(("model", "example"), [("meta", "meta"), ("meta", "cpu"), ("cpu", "meta")])
@pytest.mark.parametrize("balance", ["time", "memory"])
def test_nothing_is_measured_on_meta(model: str, example: str, balance) -> None:
    options: dict = {"blocks": 2, "example": X.to(example), "balance": balance}
    for build in (bll.split, lambda *args, **options: bll.BlockLocal(*args, classes=CLASSES, **options)):
        with pytest.raises(ValueError, match=r"blocks=2 measures the model.*meta device: pass at= or a list"):
            build(network(model), **options)
