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
        span: blocks of 64 inputs that codes are copied in at a time; whole chunks.
        depth: such spans in shared memory.
        joint: blocks of 64 inputs that x is copied in at a time; divides span.
        stages: such copies in shared memory.
        steps: matrix instructions of 16 inputs between which nothing is dequantised: 1, 2 or 4.
        cluster: thread blocks that share their copies of x.
        resident: thread blocks on a multiprocessor at a time, 1 or 2.
    """

    tokens: int
    blocks: int = 1
    span: int = 4
    depth: int = 3
    joint: int = 1
    stages: int = 4
    steps: int = 4
    cluster: int = 1
    resident: int = 1

    def defines(self, dtype: str, bits: int, axis: int, group: int) -> dict[str, object]:
        """Return what the compiler is told; `group` 0 stands for a whole row."""
        return {
            "HQQ_T": dtype,
            "HQQ_BITS": bits,
            "HQQ_AXIS": axis,
            "HQQ_GROUP": group,
            "HQQ_TOKENS": self.tokens,
            "HQQ_BLOCKS": self.blocks,
            "HQQ_SPAN": self.span,
            "HQQ_DEPTH": self.depth,
            "HQQ_JOINT": self.joint,
            "HQQ_STAGES": self.stages,
            "HQQ_STEPS": self.steps,
            "HQQ_CLUSTER": self.cluster,
            "HQQ_RESIDENT": self.resident,
        }

    def shared_bytes(self, bits: int, axis: int, group: int) -> int:
        """Return the dynamic shared memory of a block, as cuda/gemm.cu lays it out."""
        if axis == 0:
            of_block, exchange = 4 * BLOCK_INPUTS, min(self.tokens, 32) * 16 * _WARPS * 2
        else:
            of_block, exchange = 64 * (1 if group == 0 or group >= 64 else 64 // group), _WARPS * 512
        tile = self.span * (128 * bits + of_block)
        x = self.stages * self.joint * self.tokens * BLOCK_INPUTS * 2
        return x + self.depth * self.blocks * _WARPS * tile + exchange + 16 * (self.stages + self.depth)

    def fits(self, bits: int, axis: int, group: int) -> bool:
        """Return whether a multiprocessor has the shared memory for `resident` blocks."""
        each = self.shared_bytes(bits, axis, group) + _RESERVED_BYTES
        return self.resident * each <= _SHARED_BYTES + _RESERVED_BYTES


def choose(M: int, N: int, K: int, bits: int, multiprocessors: int) -> GemmConfig:
    """Return the settings for M tokens, N output features and K inputs, as measured on an H200.

    Few output tiles are cut into many pieces along the inputs, whose sums have to be added up: then tiles are small,
    and only one thread block is on a multiprocessor.
    """
    tiles = -(-N // 128)
    many = tiles >= multiprocessors
    if M <= 16:
        return GemmConfig(16, joint=4, resident=2 if many else 1)
    if M <= 32:
        return GemmConfig(32, blocks=2 if many else 1, joint=4)
    if M <= 64:
        return GemmConfig(64, joint=4)
    if M <= 128 or 2 * tiles < multiprocessors:
        return GemmConfig(128, depth=4, stages=6)
    # Whichever leaves fewer columns empty.
    if -(-M // 192) * 192 < -(-M // 256) * 256:
        return GemmConfig(192, span=2, depth=4, stages=6)
    return GemmConfig(256, span=2, depth=3, stages=5)


def fitted(config: GemmConfig, bits: int, axis: int, group: int) -> GemmConfig:
    """Return `config` with whole chunks for spans and, where shared memory does not suffice, less of everything."""
    if axis == 0:
        # A lane holds 16 scales and zeros: too much for the registers of two blocks.
        config = replace(config, resident=1)
    if config.span % chunk_blocks(bits):
        config = replace(config, span=chunk_blocks(bits), depth=max(2, config.depth // 2))
    while not config.fits(bits, axis, group):
        if config.depth > 2:
            config = replace(config, depth=config.depth - 1)
        elif config.stages > 3 or (config.stages > 2 and config.joint == 1):
            config = replace(config, stages=config.stages - 1)
        elif config.joint > 1:
            config = replace(config, joint=config.joint // 2, stages=2 * config.stages)
        elif config.span > max(2, chunk_blocks(bits)):
            config = replace(config, span=config.span // 2)
        else:
            return replace(config, resident=1)
    return config
