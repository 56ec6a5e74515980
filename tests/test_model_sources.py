"""Models of other libraries against those libraries, further arguments, and initial weights from a file."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from blocklocal import BlockLocal, Hooked
from blocklocal.lab.cli import main
from blocklocal.lab.errors import UserError
from blocklocal.lab.models import build, read_arguments, text
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
        ("hf:gpt2", {}, "no image classifier for GPT2Config, but a language model: name the data text:FILE"),
        ("hf:vit", {"patch": 4}, "has no field 'patch', did you mean 'patch_size'"),
        (f"hf:{tmp_path}", {}, "cannot be made: ValueError"),
    ):
        with pytest.raises(UserError, match=words):
            build(name, **SHAPE, arguments=arguments)


DECODERS = {
    "gpt2": {"n_embd": 16, "n_layer": 4, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2},
}
DECODERS |= dict.fromkeys(("mistral", "qwen2"), DECODERS["llama"] | {"num_key_value_heads": 2})


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_of_transformers_is_theirs_and_its_blocks_are_those_of_hooks(name: str) -> None:
    """Also in batches of one and windows of one token, as `bll sample` has them."""
    transformers = pytest.importorskip("transformers", reason="make frameworks installs transformers")
    torch.manual_seed(0)
    ours = text.build(f"hf:{name}", tokens=11, context=8, arguments=DECODERS[name])
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "max_position_embeddings": 8, "tie_word_embeddings": False}
    sizes |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(name, **DECODERS[name], **sizes)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()

    ids, y = torch.randint(11, (2, 3, 8))
    cuts = [f"{'transformer.h' if name == 'gpt2' else 'model.layers'}.{k}" for k in range(3)]
    found = []
    for kind in (BlockLocal, Hooked):
        torch.manual_seed(1)
        learner = kind(copy.deepcopy(ours), classes=11, example=ids, at=cuts)
        losses = learner.backward(ids, y)
        found.append(
            [losses, *(part.grad for module in (learner.model, learner.borders) for part in module.parameters())]
        )
        learner.eval()
        for part in (ids, ids[:1], ids[:, :5], ids[:1, :1]):
            assert torch.equal(learner.predict(part), theirs(part).logits)
        if isinstance(learner, BlockLocal):
            assert learner.side_inputs.all() == []  # no ids travel to later ranks
    assert len(found[0]) == len(found[1])
    grouped = "num_key_value_heads" in DECODERS[name]  # transformers lets torch repeat the keys if nothing is traced
    same = (lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-7)) if grouped else torch.equal
    assert all(map(same, *found))


def test_sizes_of_a_decoder_follow_from_those_that_are_given(tmp_path: Path) -> None:
    """From a name, where the width of a head follows from other fields, and from a file with tokens for padding."""
    transformers = pytest.importorskip("transformers", reason="make frameworks installs transformers")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    named: Any = text.build("hf:LlamaConfig", tokens=11, context=8, arguments=small)
    assert (named.config.head_dim, named.config.num_key_value_heads) == (8, 2)
    transformers.LlamaConfig(**small, pad_token_id=0, tie_word_embeddings=True).save_pretrained(tmp_path)
    read: Any = text.build(f"hf:{tmp_path}", tokens=11, context=8, arguments={"num_hidden_layers": 2})
    assert len(read.model.layers) == 2
    assert read.model.embed_tokens.padding_idx is None
    assert read.lm_head.weight is not read.model.embed_tokens.weight
    tied: Any = text.build(f"hf:{tmp_path}", tokens=11, context=8, arguments={"tie_word_embeddings": True})
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"two uses of 'model.embed_tokens.weight', which is 'lm_head.weight' too"):
        BlockLocal(tied, blocks=2, classes=11, example=torch.randint(11, (2, 8)))


def test_decoders_that_are_none_say_so() -> None:
    pytest.importorskip("transformers", reason="make frameworks installs transformers")
    for name, arguments, words in (
        ("hf:", {}, "unknown model 'hf:' for text: choose gpt-tiny"),
        ("hf:nothing", {}, "unknown model 'hf:nothing'"),
        ("hf:vit", {}, "no causal language model for ViTConfig"),
        ("hf:gpt2", {"n_layers": 4}, "has no field 'n_layers', did you mean 'n_layer'"),
        ("hf:gpt2", {"vocab_size": 4}, "'vocab_size' follows from the data"),
        ("hf:gpt2", {"n_positions": 4}, "'n_positions' follows from the data"),
        ("hf:gpt2", {"n_embd": 16, "n_head": 3}, "cannot be made: ValueError: .* must be divisible by num_heads"),
    ):
        with pytest.raises(UserError, match=words):
            text.build(name, tokens=11, context=8, arguments=arguments)


@pytest.mark.slow
def test_a_run_with_a_decoder_is_saved_tested_and_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="make frameworks installs transformers")
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 20)
    sizes = [f"{field}={value}" for field, value in DECODERS["llama"].items()]
    short = ["--epochs", "1", "--context", "8", "--windows", "24", "--test-size", "5", "--blocks", "4"]
    run = str(tmp_path / "run")
    main(
        ["train", f"text:{tmp_path / 'text.txt'}", "--model", "hf:llama", "--model-args", *sizes, *short, "--out", run]
    )
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    main(["eval", run])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] == trained["loss"]
    for exit in ("0", "last"):
        main(["sample", run, "--exit", exit, "--tokens", "12", "--prompt", "T"])
        assert len(capsys.readouterr().out) == len("T" + 12 * "x" + "\n")
