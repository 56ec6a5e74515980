"""Block-local learning in a loop of Accelerate, which owns the backward pass and, over processes, the gradients.

Run: python examples/accelerate_loop.py  (or accelerate launch; needs scikit-learn for the data; pip install accelerate)
"""

import torch
from accelerate import Accelerator  # type: ignore[import-not-found]
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import blocklocal as bll


def main(*, epochs: int = 10, root: str = "runs/accelerate") -> bll.BlockLocal:
    torch.manual_seed(0)
    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits, dtype=torch.float32) / 16, torch.tensor(labels)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3)]
    learner = bll.BlockLocal([*layers, nn.Linear(64, 10)], classes=10, example=x[:2])
    learner.share_feedback()  # with the other processes, if there are any

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loader = DataLoader(TensorDataset(x[:1440], y[:1440]), batch_size=32, shuffle=True)
    prepared, optimizer, loader = accelerator.prepare(learner, optimizer, loader)
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(prepared):
                losses = prepared(*batch)  # one per block: the sum gives each block the gradient of its own
                accelerator.backward(torch.stack(losses).sum())
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
    accelerator.save_state(root)  # accelerator.load_state(root) goes on from there

    learner.eval()
    for k, exit in enumerate(learner.exits(x[1440:])):
        accelerator.print(f"exit {k}: {(exit.argmax(1) == y[1440:]).float().mean():.3f}")
    return learner


if __name__ == "__main__":
    main()
