"""Every kind of target: one per token or per sequence, dense for regression and for several labels."""

from collections.abc import Sequence

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.losses import LocalLoss

CLASSES = 4


class Decoder(nn.Module):
    """A causal nn.TransformerEncoderLayer."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.causal = causal

    def forward(self, h: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1]) if self.causal else None
        return self.layer(h, src_mask=mask, is_causal=self.causal)


def fit(learner: bll.BlockLocal, x: Tensor, y: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """The first and the last losses of some steps with Adam."""
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    losses: Sequence[Tensor] = []
    for _ in range(steps):
        losses = [*losses, learner.backward(x, y)]
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[-1]


def test_targets_per_token() -> None:
    torch.manual_seed(0)
    chain = [nn.Embedding(11, 8), Decoder(causal=True), Decoder(causal=True), nn.Linear(8, 11)]
    x = torch.randint(11, (6, 5))
    y = x.cumsum(1) % 11
    learner = bll.BlockLocal(chain, classes=11, example=x)
    start, end = fit(learner, x, y, steps=60)
    assert (end < start - 0.3).all()
    assert learner.predict(x).shape == (6, 5, 11)
    assert [exit.shape for exit in learner.exits(x)] == [(6, 5, 11)] * 4
    embedded = learner.blocks[0](x).detach()
    learner.local(0, x, y)
    feedback = learner.borders[0].get_submodule("feedback")
    assert_close(feedback.get_buffer("weight")[3], embedded[y == 3].mean(0), atol=0.1, rtol=0.1)
    perturbed = x.clone()
    perturbed[:, 3] = (x[:, 3] + 1) % 11
    learner.eval()
    for early, late in zip(learner.exits(x), learner.exits(perturbed), strict=True):
        assert_close(early[:, :3], late[:, :3])  # a causal model's exits are causal


def test_one_target_per_sequence() -> None:
    torch.manual_seed(0)
    model = zoo.Transformer(pooled=True)
    x = torch.randint(11, (16, 5))
    y = x[:, 0] % CLASSES
    learner = bll.BlockLocal(model, at=["embedding", "layers.0", "layers.1"], classes=CLASSES, example=x)
    start, end = fit(learner, x, y, steps=40)
    assert (end < start - 0.3).all()
    assert learner.borders[1].get_submodule("feedback").get_buffer("weight").shape == (CLASSES, 8)


@pytest.mark.parametrize("criterion", [F.mse_loss, F.binary_cross_entropy_with_logits], ids=["regression", "labels"])
@pytest.mark.parametrize("loss", [bll.Predictive(), bll.BLL, bll.BLL_PAPER], ids=["predictive", "bll", "paper"])
def test_dense_targets(criterion, loss: LocalLoss) -> None:
    torch.manual_seed(0)
    chain = [nn.Sequential(nn.Linear(6, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 3)]
    x = torch.randn(64, 6)
    y = x[:, :3] - x[:, 3:]
    if criterion is not F.mse_loss:
        y = (y > 0).float()
    learner = bll.BlockLocal(chain, outputs=3, criterion=criterion, example=x, loss=loss)
    start, end = fit(learner, x, y, steps=60)
    assert (end < start).all()
    assert all(criterion(exit, y) < criterion(torch.zeros_like(y), y) for exit in learner.exits(x))
    assert_close(learner.backward(x, y)[-1], criterion(learner.model(x), y).detach())
