"""Four blocks on two processes: `torchrun --standalone --nproc-per-node 2 examples/pipeline.py`, or up to four."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

import blocklocal as bll


def main() -> None:
    dist.init_process_group("gloo")
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(0)  # every process builds the same model and trains its own blocks
    widths = [64, 128, 128, 128]
    hidden = [nn.Sequential(nn.Linear(i, 128), nn.BatchNorm1d(128), nn.ReLU()) for i in widths[:-1]]
    learner = bll.BlockLocal([*hidden, nn.Linear(128, 10)], classes=10, example=x[:8])
    pipeline = bll.Pipeline(learner, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))

    train, test = slice(0, 1500), slice(1500, None)
    for epoch in range(1, 11):
        order = torch.randperm(1500, generator=torch.Generator().manual_seed(epoch))  # the same in every process
        losses = torch.cat(list(pipeline.train((x[train][i], y[train][i]) for i in order.split(100)))).mean(0)
        logits = torch.cat(list(pipeline.predict([(x[test], y[test])])), 1)
        correct = (logits.argmax(-1) == y[test]).double().mean(1)
        for k, loss, accuracy in zip(pipeline.blocks, losses.tolist(), correct.tolist(), strict=True):
            print(f"epoch {epoch} rank {pipeline.rank} block {k}: loss {loss:.3f} accuracy {accuracy:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
