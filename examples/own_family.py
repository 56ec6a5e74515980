"""Your own exponential family in the variational term, on 8x8 digits.

Run: python examples/own_family.py  (needs scikit-learn for the data; seconds on a CPU)
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import blocklocal as bll


class Exponential(bll.Family):
    """Exponential distributions with mean softplus(alpha), natural parameter eta < 0 and A(eta) = -log(-eta)."""

    def natural(self, parameters: Tensor) -> Tensor:
        return -1 / (F.softplus(parameters) + 1e-2)[..., None]

    def log_normalizer(self, eta: Tensor) -> Tensor:
        return -(-eta[..., 0]).log()

    def mean(self, eta: Tensor) -> Tensor:
        return -1 / eta


def main(*, epochs: int = 10) -> float:
    torch.manual_seed(0)
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, order = x.float() / 16, torch.randperm(len(x))
    blocks = [nn.Sequential(nn.Linear(64 if k == 0 else 128, 128), nn.ReLU()) for k in range(3)]
    loss = bll.Predictive() + 0.01 * bll.Variational(family=Exponential())
    chain = [*blocks, nn.Linear(128, 10)]
    learner = bll.BlockLocal(chain, classes=10, example=x[:2], loss=loss)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
    for rows in epochs * order[:1437].split(64):
        learner.backward(x[rows], y[rows])
        optimizer.step()
        optimizer.zero_grad()
    return (learner.predict(x[order[1437:]]).argmax(1) == y[order[1437:]]).float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main():.1%}")
