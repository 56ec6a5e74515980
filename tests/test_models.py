"""The built-in models against published parameter counts, PyTorch's own attention and the chain they are cut into."""

import sys

import pytest
import torch
from torch import nn

from blocklocal import split
from blocklocal.lab.errors import UserError
from blocklocal.lab.models import CUTS, MODELS, build
from blocklocal.lab.models.resnet import Bottleneck
from blocklocal.lab.models.vit import Attention

SHAPES = [(1, (8, 8)), (1, (28, 28)), (3, (32, 32))]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet34", "resnet56", "resnet110")])
@pytest.mark.parametrize(("channels", "size"), SHAPES)
def test_every_model_takes_every_kind_of_image(name, channels, size):
    model = build(name, channels=channels, size=size, classes=7).eval()
    with torch.no_grad():
        assert model(torch.randn(2, channels, *size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # with the 3x3 stem, as of the many CIFAR-10 implementations that follow kuangliu/pytorch-cifar
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        # He et al. (2016), Table 6, rounded there; 2,752 for the two 1x1 shortcuts with their norms
        ("resnet20", 269_722 + 2_752),
        ("resnet32", 464_154 + 2_752),
        ("resnet56", 853_018 + 2_752),
        ("resnet110", 1_727_962 + 2_752),
    ],
)
def test_residual_networks_have_their_published_size(name, count):
    with torch.device("meta"):
        model = build(name, channels=3, size=(32, 32), classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_names_are_those_of_torchvision():
    with torch.device("meta"):
        names = build("resnet18", channels=3, size=(32, 32), classes=10).state_dict().keys()
    known = ["conv1.weight", "bn1.running_mean", "layer1.0.conv2.weight", "layer2.0.downsample.0.weight", "fc.bias"]
    assert {*known} <= {*names}
    assert len(names) == 122  # torchvision.models.resnet18().state_dict()


@pytest.mark.parametrize(("name", "blocks"), CUTS)
def test_recipes_cut_where_the_model_is_a_chain(name, blocks):
    model = build(name, channels=3, size=(16, 16), classes=10).eval()
    chain = split(model, at=CUTS[name, blocks]).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(chain(x), model(x))
    assert len(chain) == blocks


def test_the_papers_cut_puts_four_bottlenecks_in_each_block():
    with torch.device("meta"):
        model = build("resnet50", channels=3, size=(32, 32), classes=10)
    owners = {
        p: name for name, module in model.named_modules() if isinstance(module, Bottleneck) for p in module.parameters()
    }
    chain = split(model, at=CUTS["resnet50", 4])
    assert [len({owners[p] for p in block.parameters() if p in owners}) for block in chain] == [4, 4, 4, 4]


@pytest.mark.parametrize("side", [8, 28, 32])
def test_the_cut_of_vgg8_is_per_layer(side):
    """One convolution, or the classifier, in each block, and at each border positions that Pred-Sim can compare."""
    model = build("vgg8", channels=3, size=(side, side), classes=10)
    h, maps = torch.randn(2, 3, side, side), []
    for block in split(model, at=CUTS["vgg8", 8]):
        h = block(h)
        maps.append(h.shape[2:])
        assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in block.modules()) == 1
    assert maps[-1] == ()
    assert min(shape.numel() for shape in maps[:-1]) >= 4


def test_attention_is_pytorchs():
    ours, theirs = Attention(24, heads=3), nn.MultiheadAttention(24, 3, batch_first=True)
    assert theirs.in_proj_weight is not None
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    h = torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(h), theirs(h, h, h, need_weights=False)[0])


@pytest.mark.parametrize(
    ("size", "tokens"), [((8, 8), 64), ((28, 28), 49), ((32, 32), 64), ((64, 64), 64), ((8, 32), 64)]
)
def test_the_transformer_cuts_images_into_patches(size, tokens):
    model = build("vit", channels=1, size=size, classes=2)
    assert model.get_parameter("patch_embed.position").shape[0] == tokens


def test_a_function_of_ones_own_is_a_model(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(*, channels, size, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], classes))\n"
        "def other(width):\n"
        "    return nn.Identity()\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = build("mine:net", channels=2, size=(3, 4), classes=5)
    assert model(torch.zeros(1, 2, 3, 4)).shape == (1, 5)
    for name, words in {
        "mine:other": "channels=, size=, classes=",
        "mine:missing": "no function 'missing'",
        "mine:number": "no function 'number'",
        "yours:net": "no module 'yours'",
    }.items():
        with pytest.raises(UserError, match=words):
            build(name, channels=2, size=(3, 4), classes=5)


def test_models_that_cannot_be_built_say_why():
    with pytest.raises(UserError, match=r"resnet19.*resnet20.*timm:NAME"):
        build("resnet19", channels=3, size=(32, 32), classes=10)
    with pytest.raises(UserError, match="31x31"):
        build("vit", channels=3, size=(31, 31), classes=10)


@pytest.mark.parametrize(
    ("source", "package"), [("timm", "timm"), ("torchvision", "torchvision"), ("hf", "transformers")]
)
def test_a_missing_package_is_named(monkeypatch, source, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        build(f"{source}:resnet18", channels=3, size=(32, 32), classes=10)
