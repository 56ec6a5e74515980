"""What training loops have, per block: parameter groups, schedules, clipping, a GradScaler; and an average of weights.

Run: python examples/optimisation.py  (needs scikit-learn for the data; seconds on a CPU)
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import blocklocal as bll

LARGEST_NORM = 1.0


def groups(parameters: list[nn.Parameter]) -> list[dict]:
    """Weight decay for matrices and kernels alone."""
    weights, others = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() < 2]
    return [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]


def main(*, steps: int = 400) -> tuple[bll.BlockLocal, AveragedModel, Tensor, Tensor]:
    torch.manual_seed(0)
    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits, dtype=torch.float32) / 16, torch.tensor(labels)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()) for _ in range(3)]
    learner = bll.BlockLocal([*layers, nn.Linear(64, 10)], classes=10, example=x[:2])

    optimizers = [AdamW(groups(learner.block_parameters(k))) for k in range(4)]
    schedules = [OneCycleLR(optimizer, max_lr=0.01, total_steps=steps) for optimizer in optimizers]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    average = AveragedModel(learner, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for rows in torch.randint(1440, (steps, 64)):
        with torch.autocast("cpu", torch.bfloat16):
            learner.backward(x[rows], y[rows], scaler=scaler)
        for k, (optimizer, schedule) in enumerate(zip(optimizers, schedules, strict=True)):
            scaler.unscale_(optimizer)
            clip_grad_norm_(learner.block_parameters(k), LARGEST_NORM)
            scaler.step(optimizer)  # not where this block's gradients have overflowed
            optimizer.zero_grad()
            schedule.step()
        scaler.update()
        average.update_parameters(learner)
    for name, one in {"weights": learner, "their average": average.module}.items():
        accuracies = [(exit.argmax(1) == y[1440:]).float().mean() for exit in one.eval().exits(x[1440:])]
        print(f"{name}: accuracy of each exit", *(f"{accuracy:.3f}" for accuracy in accuracies))
    return learner, average, x, y


if __name__ == "__main__":
    main()
