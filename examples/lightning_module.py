"""Block-local learning inside Lightning, which owns the backward pass and the optimizer.

Run: python examples/lightning_module.py  (needs scikit-learn for the data, and lightning: pip install lightning)
"""

from itertools import pairwise

import lightning  # type: ignore[import-not-found]
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import blocklocal as bll


class BlockLocalModule(lightning.LightningModule):
    """Any model, trained in blocks. For each block, the sum of the local losses has the gradient of its own loss."""

    def __init__(self, model: nn.Module, **options) -> None:
        super().__init__()
        self.learner = bll.BlockLocal(model, **options)
        self.learner.share_feedback()  # with the other processes under strategy="ddp"

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = self.learner(*batch)
        self.log_dict({f"loss/block{k}": loss.detach() for k, loss in enumerate(losses)})
        return torch.stack(losses).sum()

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        for k, exit in enumerate(self.learner.exits(x)):
            self.log(f"accuracy/exit{k}", (exit.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(*, epochs: int = 12, root: str = "runs/lightning") -> float:
    lightning.seed_everything(0)
    digits, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(digits))
    x, y = torch.tensor(digits, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    train = DataLoader(TensorDataset(x[:1437], y[:1437]), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(x[1437:], y[1437:]), batch_size=360)

    widths = [64, 128, 128, 128]
    hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
    module = BlockLocalModule(nn.Sequential(*hidden, nn.Linear(128, 10)), classes=10, example=x[:2])
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=root, logger=False)
    trainer.fit(module, train)
    (result,) = trainer.test(module, test)
    return result["accuracy/exit3"]


if __name__ == "__main__":
    main()
