"""How the fused GEMM divides its work: sizes of tiles and rings, chosen by the shape of a product."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hqq.kernels.tile_layout import BLOCK_INPUTS, chunk_blocks

_WARPS = 8
_SHARED_BYTES = 232448  # that a block may have at compute capability 9.0
_RESERVED_BYTES = 1024  # of shared memory, for each block


@dataclass(frozen=True)
class GemmConfig:
    """Settings of cuda/gemm.cu.

    Attributes:
        tokens: columns of a tile, a multiple of 16 for which there is a matrix instruction.
        blocks: tiles of 16 output features of a warp; 8 warps share the tokens.
        stages: blocks of 64 inputs of x in shared memory.
        depth: chunks of codes under way, for each warp.
        cluster: blocks that share their copies of x.
        resident: blocks on a multiprocessor at a time, 1 or 2.
        steps: matrix instructions between two waits, 2 or 4.
    """

    tokens: int
    blocks: int = 1
    stages: int = 4
    depth: int = 6
    cluster: int = 1
    resident: int = 1
    steps: int = 4

    def defines(self, dtype: str, bits: int, axis: int, group: int) -> dict[str, object]:
        """Return what the compiler is told; `group` 0 stands for a whole row."""
        return {
            "HQQ_T": dtype,
            "HQQ_BITS": bits,
            "HQQ_AXIS": axis,
            "HQQ_GROUP": group,
            "HQQ_TOKENS": self.tokens,
            "HQQ_BLOCKS": self.blocks,
            "HQQ_STAGES": self.stages,
            "HQQ_DEPTH": self.depth,
            "HQQ_CLUSTER": self.cluster,
            "HQQ_RESIDENT": self.resident,
            "HQQ_STEPS": self.steps,
        }

    def shared_bytes(self, bits: int, axis: int, group: int) -> int:
        """Return the dynamic shared memory of a block, as cuda/gemm.cu lays it out."""
        blocks = chunk_blocks(bits)
        loads = max(1, blocks * bits // 4)
        if axis == 0:
            of_block, exchange = 4 * BLOCK_INPUTS, min(self.tokens, 32) * 16 * _WARPS * 2
        else:
            of_block, exchange = 64 * (1 if group == 0 or group >= 64 else 64 // group), _WARPS * 512
        slot = 512 * loads + blocks * of_block
        x = self.stages * self.tokens * BLOCK_INPUTS * 2
        return x + _WARPS * self.depth * self.blocks * slot + exchange + 16 * self.stages

    def fits(self, bits: int, axis: int, group: int) -> bool:
        """Return whether a multiprocessor has the shared memory for `resident` blocks."""
        each = self.shared_bytes(bits, axis, group) + _RESERVED_BYTES
        return self.resident * each <= _SHARED_BYTES + _RESERVED_BYTES


def choose(M: int, N: int, K: int, bits: int, multiprocessors: int) -> GemmConfig:
    """Return the settings for M tokens, N output features and K inputs."""
    if M <= 64:
        return GemmConfig(16 if M <= 16 else 32 if M <= 32 else 64, resident=2)
    if M <= 128:
        return GemmConfig(128, blocks=2)
    return GemmConfig(256, cluster=2)


def fitted(config: GemmConfig, bits: int, axis: int, group: int) -> GemmConfig:
    """Return `config` with as many codes under way as there is shared memory for.

    depth counts blocks of 64 inputs here, whatever a chunk holds; then stages give way.
    """
    config = replace(config, depth=max(2, -(-config.depth // chunk_blocks(bits)) + (chunk_blocks(bits) > 1)))
    while not config.fits(bits, axis, group):
        if config.depth > 2:
            config = replace(config, depth=config.depth - 1)
        elif config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        else:
            return replace(config, resident=1)
    return config
