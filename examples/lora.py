"""Pretrained weights, a frozen first block, and LoRA adapters of peft in the others: blocks learn only their adapters.

Run: python examples/lora.py  (needs scikit-learn for the data, and peft: pip install peft)
"""

import torch
from peft import LoraConfig, inject_adapter_in_model  # type: ignore[import-not-found]
from sklearn.datasets import load_digits
from torch import Tensor, nn

import blocklocal as bll


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.classifier(self.second(self.first(h).relu()).relu())


def train(learner: bll.Hooked, optimizers: list, x: Tensor, y: Tensor, *, steps: int) -> None:
    for rows in torch.randint(len(x), (steps, 64)):
        learner.backward(x[rows], y[rows], optimizers=optimizers)


def main(*, steps: int = 300) -> tuple[dict[str, Tensor], bll.Hooked, Tensor, Tensor]:
    torch.manual_seed(0)
    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits, dtype=torch.float32) / 16, torch.tensor(labels)
    cuts = {"at": ["stem", "first"], "classes": 10, "example": x[:4]}
    before = bll.Hooked(Network(), **cuts)
    train(before, [torch.optim.Adam(before.block_parameters(k)) for k in range(3)], x, y, steps=steps)
    pretrained = before.model.state_dict()

    model = Network()
    model.load_state_dict(pretrained)
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["first", "second", "classifier"]), model)
    model.stem.requires_grad_(False)
    learner = bll.Hooked(model, **cuts)
    trained = [[p for p in learner.block_parameters(k) if p.requires_grad] for k in range(3)]
    flipped = x.reshape(-1, 8, 8).flip(2).flatten(1)  # the new task: mirrored digits
    train(learner, [None, *(torch.optim.Adam(p, lr=0.01) for p in trained[1:])], flipped, y, steps=steps)
    learner.eval()
    accuracies = [(exit.argmax(1) == y).float().mean().item() for exit in learner.exits(flipped)]
    print("accuracy of each exit", *(f"{accuracy:.3f}" for accuracy in accuracies))
    return pretrained, learner, flipped, y


if __name__ == "__main__":
    main()
