"""Mistakes are told where they are made, before anything moves."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import blocklocal as bll

CLASSES = 4


def chain() -> list[nn.Module]:
    return [nn.Linear(6, 8), nn.Linear(8, CLASSES)]


X = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (chain(), {"classes": 4}, "pass example=, a batch of inputs"),
        (chain(), {"example": X}, r"pass either classes= \(integer labels\) or outputs="),
        (chain(), {"classes": 4, "outputs": 4, "example": X}, "pass either classes="),
        (chain(), {"classes": 0, "example": X}, "classes=0: must be an integer, classes >= 1"),
        (chain(), {"classes": 1, "example": X}, "classes=1: with one class there is nothing to tell apart"),
        (chain(), {"outputs": 2.5, "criterion": F.mse_loss, "example": X}, "outputs=2.5: must be an integer"),
        (chain(), {"outputs": 4, "example": X}, "dense targets have no loss of their own: pass criterion="),
        (chain(), {"classes": 7, "example": X}, r"returns a tensor of shape \(4, 4\): its last dimension must be 7"),
        (chain(), {"classes": 4, "example": X, "at": ["0"], "blocks": 2}, "at= and blocks= both say"),
        (chain(), {"classes": 4, "example": X, "loss": bll.Predictive("conv")}, "conv.* needs feature maps"),
        (
            chain(),
            {"classes": 4, "example": X, "loss": bll.Variational(bll.Categorical(3))},
            "divisible by 3, .* has 8",
        ),
        (
            [nn.LSTM(6, 8), nn.Linear(8, 4)],
            {"classes": 4, "example": X},
            "block 0 returns a tuple: a block must return one",
        ),
        ([nn.Linear(6, 4), nn.Flatten(0)], {"classes": 4, "example": X}, r"block 1 returns a tensor of shape \(16,\)"),
        (
            [nn.Flatten(1), nn.Unflatten(1, (2, 3)), nn.Linear(3, 4)],
            {"classes": 4, "example": X},
            r"a block returns a tensor of shape \(4, 6\), but the model predicts per token.*one vector per token",
        ),
    ],
)
def test_mistakes_are_told(model, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bll.BlockLocal(model, **options)


def linear(weight: torch.Tensor) -> list[nn.Module]:
    first, last = chain()
    first.weight = nn.Parameter(weight)
    return [first, last]


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(1).expand(8, 6), torch.randn(8, 1).expand(8, 6), torch.randn(13).as_strided((8, 6), (1, 1))],
)
def test_a_parameter_that_shares_memory_with_itself_is_told(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"parameter '0.weight' shares memory with itself.*clone\(\)"):
        bll.BlockLocal(linear(weight), classes=CLASSES, example=X)


@pytest.mark.parametrize(
    "weight",
    [torch.randn(8, 6), torch.randn(6, 8).T, torch.randn(16, 12)[::2, ::2]],
)
def test_parameters_of_any_other_strides_are_taken(weight: torch.Tensor) -> None:
    bll.BlockLocal(linear(weight), classes=CLASSES, example=X)


def test_labels_out_of_range_are_told_before_anything_moves() -> None:
    for blocks in (1, None):
        learner = bll.BlockLocal(nn.Sequential(*chain()), blocks=blocks, classes=CLASSES, example=X)
        before = copy.deepcopy(learner.state_dict())
        for step in (learner, learner.backward, learner.diagnose):
            with pytest.raises(ValueError, match="labels run from 0 to 4, but must be from 0 to 3"):
                step(X, torch.tensor([0, 1, 4, 2]))
        assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


def test_a_prediction_of_another_size_is_told_at_the_first_step_of_one_block() -> None:
    model = nn.Linear(6, 13)
    learner, before = bll.BlockLocal(model, blocks=1, classes=10), copy.deepcopy(model.state_dict())
    for step in (learner, learner.backward):
        with pytest.raises(ValueError, match=r"returns a tensor of shape \(4, 13\): its last dimension must be 10"):
            step(X, torch.tensor([0, 1, 9, 2]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"the model returns a tensor of shape \(4, 8\): its last dimension must be 9"):
        bll.BlockLocal(nn.LSTM(6, 8), blocks=1, classes=9).backward(X, torch.tensor([0, 1, 7, 2]))
    dense = bll.BlockLocal(model, blocks=1, outputs=1, criterion=F.mse_loss)
    with pytest.raises(ValueError, match="its last dimension must be 1, the number of classes or outputs"):
        dense.backward(X, torch.zeros(4, 1))
