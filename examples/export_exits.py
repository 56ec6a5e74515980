"""The trained model, each early exit, and the exits combined, exported by torch.export and as ONNX files.

Run: python examples/export_exits.py  (pip install scikit-learn onnx onnxscript onnxruntime)
"""

from pathlib import Path

import numpy as np
import onnxruntime  # type: ignore[import-not-found]
import torch
from sklearn.datasets import load_digits
from torch import nn

import blocklocal as bll


def main(*, root: str = "runs/onnx", steps: int = 200, learner_of: type = bll.BlockLocal) -> dict:
    torch.manual_seed(0)
    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    units = [nn.Sequential(nn.Conv2d(c, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for c in (1, 16, 16)]
    model = nn.Sequential(*units, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)))
    learner = learner_of(model, at=["0", "1"], classes=10, example=x[:8])
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    for rows in torch.randint(1440, (steps, 64)):
        learner.backward(x[rows], y[rows])
        optimizer.step()
        optimizer.zero_grad()
    learner.fit_exits([(x[1440:], y[1440:])])
    Path(root).mkdir(parents=True, exist_ok=True)
    batch = {0: torch.export.Dim("batch")}
    inputs = (batch,) if learner_of is bll.BlockLocal else ((batch,),)  # a hooked model takes any number: *inputs
    found = {}
    for exit in (0, 1, None, "all"):
        predictor = learner.predictor(exit=exit).eval()  # without the weights of later blocks
        program = torch.export.export(predictor, (x[:8],), dynamic_shapes=inputs)
        file = Path(root, f"exit-{exit}.onnx")
        torch.onnx.export(program, f=file, dynamo=True, external_data=False)
        session = onnxruntime.InferenceSession(file)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x[1440:].numpy()})
        with torch.no_grad():
            eager, exported = predictor(x[1440:]), program.module()(x[1440:])
        found[exit] = {
            "torch.export": (exported - eager).abs().max().item(),
            "onnx": np.abs(logits - eager.numpy()).max().item(),
            "parameters": sum(p.numel() for p in predictor.parameters()),
            "bytes": file.stat().st_size,
        }
        print(exit, found[exit])
    return found


if __name__ == "__main__":
    main()
