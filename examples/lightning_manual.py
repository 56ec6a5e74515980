"""Block-local learning in Lightning with manual optimisation: one block's graph at a time, as in a loop of your own.

Run: python examples/lightning_manual.py  (needs scikit-learn for the data, and lightning: pip install lightning)
"""

from typing import Any

import lightning  # type: ignore[import-not-found]
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import blocklocal as bll


class ManualModule(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        layers = [nn.Sequential(nn.Linear(64, 128), nn.ReLU()), nn.Sequential(nn.Linear(128, 128), nn.ReLU())]
        self.learner = bll.BlockLocal([*layers, nn.Linear(128, 10)], classes=10, example=torch.zeros(2, 64))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        losses = self.learner.backward(*batch)  # block after block, each with its own graph
        self.clip_gradients(optimizer, gradient_clip_val=10.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        self.log_dict({f"loss/block{k}": loss for k, loss in enumerate(losses)})

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.SGD(self.learner.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)]


def main(*, epochs: int = 8, root: str = "runs/lightning", checkpoint: str | None = None) -> ManualModule:
    lightning.seed_everything(0)
    digits, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(digits, dtype=torch.float32) / 16, torch.tensor(labels))
    module = ManualModule()
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=root, logger=False)
    trainer.fit(module, DataLoader(data, batch_size=64), ckpt_path=checkpoint)  # goes on where the checkpoint stands
    trainer.save_checkpoint(f"{root}/last.ckpt")  # ManualModule.load_from_checkpoint(f"{root}/last.ckpt") reads it
    return module


if __name__ == "__main__":
    main()
