"""The Phi family under its old name: AutoHQQHFModel with the layer tags that the family quantises."""

from __future__ import annotations

from hqq.models.hf.base import AutoHQQHFModel

LINEAR_TAGS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.dense",
    "mlp.fc1",
    "mlp.fc2",
)


class PhiHQQ(AutoHQQHFModel):
    """Quantises the attention and feed-forward layers of Phi models."""

    @classmethod
    def get_linear_tags(cls) -> list[str]:
        """Return the tags of these layers."""
        return list(LINEAR_TAGS)
