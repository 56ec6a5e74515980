"""A small vision transformer (Dosovitskiy et al., 2021): pre-norm, mean over tokens instead of a class token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocklocal.lab.errors import UserError


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, T, D); where causal, each reads itself and those before it."""

    def __init__(self, width: int, *, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a perceptron of four times the width, each with a residual connection."""

    def __init__(self, width: int, *, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads=heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attn(self.norm1(h))
        return h + self.mlp(self.norm2(h))


class PatchEmbedding(nn.Module):
    """Images (B, C, H, W) to tokens (B, T, D), one per patch, with a learned position."""

    def __init__(self, *, channels: int, patch: int, tokens: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2) + self.position


class VisionTransformer(nn.Module):
    """`depth` blocks between a patch embedding and a linear classifier of the tokens' mean."""

    def __init__(
        self,
        *,
        channels: int,
        size: tuple[int, int],
        classes: int,
        width: int = 192,
        depth: int = 8,
        heads: int = 3,
    ) -> None:
        super().__init__()
        patch = _patch(size)
        tokens = (size[0] // patch) * (size[1] // patch)
        self.patch_embed = PatchEmbedding(channels=channels, patch=patch, tokens=tokens, width=width)
        self.blocks = nn.Sequential(*(Block(width, heads=heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch_embed(x))).mean(1))


def _patch(size: tuple[int, int]) -> int:
    """The smallest side of square patches of which at most 64 tile the image."""
    for patch in (1, 2, 4, 8, 16, 32):
        if size[0] % patch == size[1] % patch == 0 and (size[0] // patch) * (size[1] // patch) <= 64:
            return patch
    raise UserError(
        f"model 'vit' needs equal patches, but {size[1]}x{size[0]} pixels cannot be divided into any of side 2 to 32"
    )
