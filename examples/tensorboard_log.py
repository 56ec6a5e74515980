"""Each block's loss and what its border shows, in TensorBoard, from a loop of your own.

Run: python examples/tensorboard_log.py; tensorboard --logdir runs  (pip install scikit-learn tensorboard; for runs of
the command there is bll train --tensorboard)
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import blocklocal as bll


def main(*, steps: int = 200, root: str = "runs/tensorboard") -> list[list[float]]:
    torch.manual_seed(0)
    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits, dtype=torch.float32) / 16, torch.tensor(labels)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2)]
    learner = bll.BlockLocal([*layers, nn.Linear(64, 10)], classes=10, example=x[:2])
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
    history = []
    with SummaryWriter(root) as writer:
        for step, rows in enumerate(torch.randint(len(x), (steps, 64))):
            losses = learner.backward(x[rows], y[rows])
            optimizer.step()
            optimizer.zero_grad()
            for k, loss in enumerate(losses):
                writer.add_scalar(f"loss/block{k}", loss, step)
            if step % 50 == 0:
                for k, report in enumerate(learner.diagnose(x[:500], y[:500])):
                    for name, value in report.items():  # agreement of alpha and beta, variance ratio, loss terms
                        writer.add_scalar(f"border{k}/{name}", value, step)
            history.append(losses.tolist())
    return history


if __name__ == "__main__":
    main()
