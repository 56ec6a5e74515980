"""A small decoder for text: GPT-2's pre-norm blocks (Radford et al., 2019), in the sizes of nanoGPT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blocklocal.lab.models.vit import Block


class GPT(nn.Module):
    """Logits (B, T, n) of the next token after each of ids (B, T), T at most `context`.

    >>> GPT(tokens=65, context=64, width=128, depth=4, heads=4)(torch.zeros(2, 8, dtype=torch.int64)).shape
    torch.Size([2, 8, 65])
    """

    def __init__(self, *, tokens: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads=heads, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # as in GPT-2: what is added to the residual stream starts smaller
                residual = name.endswith(("proj.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))
