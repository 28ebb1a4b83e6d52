"""The Mixtral family under its old name: AutoHQQHFModel with the layer tags that the family quantises."""

from __future__ import annotations

from hqq.models.hf.base import AutoHQQHFModel

LINEAR_TAGS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "block_sparse_moe.experts.w1",
    "block_sparse_moe.experts.w2",
    "block_sparse_moe.experts.w3",
)


class MixtralHQQ(AutoHQQHFModel):
    """Quantises the attention and feed-forward layers of Mixtral models."""

    @classmethod
    def get_linear_tags(cls) -> list[str]:
        """Return the tags of these layers."""
        return list(LINEAR_TAGS)
