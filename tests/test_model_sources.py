"""Models of other libraries against those libraries, further arguments, and initial weights from a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from blocklocal.lab.errors import UserError
from blocklocal.lab.models import build, read_arguments
from blocklocal.lab.models.weights import load_weights
from blocklocal.lab.settings import Settings
from blocklocal.lab.training.experiment import prepare

SHAPE = {"channels": 3, "size": (32, 32), "classes": 5}
SMALL = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def test_arguments_are_literals_or_text() -> None:
    given = ["img_size=32", "depths=[1,2]", "act=gelu", "rate=0.5", "bias=False", "name='a=b'", "open=(1,"]
    assert read_arguments(given) == {
        "img_size": 32,
        "depths": [1, 2],
        "act": "gelu",
        "rate": 0.5,
        "bias": False,
        "name": "a=b",
        "open": "(1,",
    }
    for wrong in (["img_size"], ["=3"], ["a b=3"], ["a="], ["a=1", "a=2"]):
        with pytest.raises(UserError, match="--model-args"):
            read_arguments(wrong)


def test_arguments_reach_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "narrow.py").write_text(
        "from torch import nn\n"
        "def net(*, channels, size, classes, width=3):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.Linear(width, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = build("narrow:net", **SHAPE, arguments={"width": 7})
    assert isinstance(model, nn.Sequential)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert model[2].in_features == 7
    with pytest.raises(UserError, match="'size' follows from the data"):
        build("narrow:net", **SHAPE, arguments={"size": 7})
    with pytest.raises(UserError, match=r"model 'cnn' cannot be made: TypeError.*colour"):
        build("cnn", **SHAPE, arguments={"colour": 7})


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_from_a_file(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights.{suffix}"
    state = build("resnet8", **SHAPE).state_dict()
    (save_file if suffix == "safetensors" else torch.save)(state, file)
    model = build("resnet8", **SHAPE)
    load_weights(model, str(file))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_weights_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    file, model = tmp_path / "weights.pt", build("resnet8", **SHAPE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    cases: list[tuple[object, str]] = [
        ({**state, "fc.bias": torch.zeros(7)}, r"'fc\.bias' has shape \(7,\), the model's \(5,\)"),
        ({name: value for name, value in state.items() if name != "fc.bias"}, r"'fc\.bias' missing"),
        ({**state, "other": torch.zeros(1)}, "'other' not in the model"),
        ({"epoch": 3, "state": state}, "holds no state dict"),
        ([1], "holds no state dict"),
        (Exception, "it is not a file of weights"),
    ]
    for content, words in cases:
        torch.save(content, file)
        with pytest.raises(UserError, match=words):
            load_weights(model, str(file))
    (tmp_path / "text.safetensors").write_text("text")
    for name, words in (("text.safetensors", "not a file of weights"), ("none.pt", "No such file"), ("", "director")):
        with pytest.raises(UserError, match=words):
            load_weights(model, str(tmp_path / name))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_run_begins_with_them(tmp_path: Path) -> None:
    state = build("mlp", channels=1, size=(8, 8), classes=10).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    plain = Settings(model="mlp", train_size=64, test_size=16)
    given = replace(plain, weights=str(tmp_path / "weights.safetensors"))
    drawn, read = (prepare(settings).learner.model.state_dict() for settings in (plain, given))
    assert all(torch.equal(read[name], value) for name, value in state.items())
    assert not torch.equal(drawn["layer1.0.weight"], state["layer1.0.weight"])


def test_a_classifier_of_transformers_is_theirs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="make frameworks installs transformers")
    config = transformers.ViTConfig(**SMALL, image_size=32, num_labels=5)
    config.save_pretrained(tmp_path)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForImageClassification.from_config(config).eval()
    x = torch.randn(2, 3, 32, 32)
    for name, arguments in (
        ("hf:vit", SMALL),
        ("hf:ViTConfig", SMALL),
        (f"hf:{tmp_path}", {}),
        (f"hf:{tmp_path / 'config.json'}", {}),
    ):
        torch.manual_seed(0)
        ours = build(name, **SHAPE, arguments=arguments).eval()
        assert isinstance(ours(x), Tensor)
        assert torch.equal(ours(x), theirs(x).logits)
        assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_configurations_that_are_none_say_so(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="make frameworks installs transformers")
    (tmp_path / "config.json").write_text("{}")
    for name, arguments, words in (
        ("hf:nothing", {}, "unknown model 'hf:nothing'"),
        ("hf:gpt2", {}, "no image classifier for GPT2Config"),
        ("hf:vit", {"patch": 4}, "has no field 'patch', did you mean 'patch_size'"),
        (f"hf:{tmp_path}", {}, "cannot be made: ValueError"),
    ):
        with pytest.raises(UserError, match=words):
            build(name, **SHAPE, arguments=arguments)
