"""Weights of the layers of well-known models, drawn on the GPU with the tails of trained ones."""

from __future__ import annotations

import torch
from torch import Tensor

# Output and input features of the linear layers of one block.
LLAMA_8B = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
LLAMA_8B_BLOCKS = 32
LLAMA_70B = {
    "q_proj": (8192, 8192),
    "k_proj": (1024, 8192),
    "v_proj": (1024, 8192),
    "o_proj": (8192, 8192),
    "gate_proj": (28672, 8192),
    "up_proj": (28672, 8192),
    "down_proj": (8192, 28672),
}


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return normal weights times a slowly heavy-tailed factor, of the size of trained ones."""
    size = 0.02 * torch.exp(0.3 * torch.randn(shape, device="cuda", dtype=torch.float32))
    return (size * torch.randn(shape, device="cuda", dtype=torch.float32)).to(dtype)
