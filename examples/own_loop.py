"""Train your own network in blocks, in your own loop: digits of 8x8 pixels, three blocks, one optimizer.

Run: python examples/own_loop.py  (needs scikit-learn for the data; seconds on a CPU)
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import blocklocal as bll


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch(self.norm(h))


class Network(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.body = nn.Sequential(Residual(width), Residual(width))
        self.top = nn.Sequential(Residual(width), Residual(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.top(self.body(self.stem(images)))


def main(*, epochs: int = 10, batch: int = 64) -> float:
    torch.manual_seed(0)
    digits, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(digits))
    x, y = torch.tensor(digits, dtype=torch.float32)[order].reshape(-1, 8, 8) / 16, torch.tensor(labels)[order]
    (train_x, test_x), (train_y, test_y) = x.split([1437, 360]), y.split([1437, 360])

    model = Network()
    learner = bll.BlockLocal(model, at=["stem", "body"], classes=10, example=x[:2])
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        learner.train()
        for rows in torch.randperm(len(train_x)).split(batch):
            learner.backward(train_x[rows], train_y[rows])
            optimizer.step()
            optimizer.zero_grad()
        learner.eval()
        accuracies = [(exit.argmax(1) == test_y).float().mean().item() for exit in learner.exits(test_x)]
        print(f"epoch {epoch}: accuracy of each exit", *(f"{accuracy:.3f}" for accuracy in accuracies))

    early = learner.predict(test_x, confidence=0.99)  # each image leaves at the first exit that is sure of it
    print(f"accuracy with early exits {(early.argmax(1) == test_y).float().mean().item():.3f}")
    return (model(test_x).argmax(1) == test_y).float().mean().item()  # the model passed in is the trained one


if __name__ == "__main__":
    print(f"accuracy {main():.3f}")
