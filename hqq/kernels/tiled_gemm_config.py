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
        tokens: columns of a tile, a multiple of 16 (axis 0: of 32, or 16) for which there is a matrix instruction.
        blocks: tiles of 16 output features of a warp; 8 warps share the tokens.
        span: blocks of 64 inputs that codes are copied in at a time; whole chunks.
        depth: such spans in shared memory.
        joint: blocks of 64 inputs that x is copied in at a time; divides span.
        stages: such copies in shared memory.
        steps: matrix instructions of 16 inputs between which nothing is dequantised: 1, 2 or 4.
        split: thread blocks, a cluster, that share the inputs of an output tile; 0: all thread blocks share all
            output tiles equally.
        resident: thread blocks on a multiprocessor at a time, 1 or 2.
    """

    tokens: int
    blocks: int = 1
    span: int = 4
    depth: int = 3
    joint: int = 1
    stages: int = 4
    steps: int = 4
    split: int = 0
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
            "HQQ_SPLIT": self.split,
            "HQQ_RESIDENT": self.resident,
        }

    def shared_bytes(self, bits: int, axis: int, group: int) -> int:
        """Return the dynamic shared memory of a block, as cuda/gemm_shape.cuh lays it out."""
        part = 16 if axis == 1 or self.tokens < 32 else 32
        if axis == 0:
            of_block, exchange = 4 * BLOCK_INPUTS, part * 16 * _WARPS * 2
        else:
            of_block, exchange = 64 * (1 if group == 0 or group >= 64 else 64 // group), _WARPS * 512
        tile = self.span * (128 * bits + of_block)
        x = self.stages * self.joint * self.tokens * BLOCK_INPUTS * 2
        partners = max(1, self.split)
        received = (partners - 1) * -(-self.blocks * self.tokens // part // partners) * part * 512
        rings = x + self.depth * self.blocks * _WARPS * tile
        return max(rings, received) + exchange + 16 * (self.stages + self.depth + 1)

    def fits(self, bits: int, axis: int, group: int) -> bool:
        """Return whether a multiprocessor has the shared memory for `resident` blocks."""
        each = self.shared_bytes(bits, axis, group) + _RESERVED_BYTES
        return self.resident * each <= _SHARED_BYTES + _RESERVED_BYTES


# Columns of a tile, and the rings measured best with them: span, depth, joint, stages.
_RINGS = {
    16: (4, 3, 4, 4),
    32: (4, 3, 4, 4),
    48: (4, 3, 4, 4),
    64: (4, 3, 4, 4),
    80: (4, 4, 2, 5),
    96: (4, 4, 2, 5),
    128: (4, 4, 1, 6),
    160: (4, 3, 1, 5),
    192: (2, 4, 1, 6),
    256: (2, 3, 1, 5),
}
# With so few tokens and rows so long, tiles are not halved.
_FEW_TOKENS, _LONG_ROWS = 160, 8192
# Of a GPU's multiprocessors, how many are to be busy: with the inputs split in two, and with whole output tiles.
_BUSY_SPLIT, _BUSY_WHOLE = 0.7, 0.9


def choose(M: int, N: int, K: int, bits: int, multiprocessors: int) -> GemmConfig:
    """Return the settings for M tokens, N output features and K inputs, as measured on an H200."""
    tiles = -(-N // 128)
    if M <= 16:
        return _with_tokens(16, resident=2 if tiles >= multiprocessors else 1)
    return _all_at_once(M, tiles, K, multiprocessors) or _in_shares(M, tiles, multiprocessors)


def _all_at_once(M: int, tiles: int, K: int, multiprocessors: int) -> GemmConfig | None:
    """Return settings with which one round of thread blocks makes all output tiles, or None where too few are busy."""
    if M <= _FEW_TOKENS and K > _LONG_ROWS:
        return None
    abreast = multiprocessors // tiles
    if abreast >= 2:
        halved = _columns(max(32, -(-M // (abreast // 2))))
        if halved <= 192 and 2 * tiles * -(-M // halved) >= _BUSY_SPLIT * multiprocessors:
            return _with_tokens(halved, split=2)
    if abreast >= 1:
        whole = _columns(max(128, -(-M // abreast)))
        output_tiles = tiles * -(-M // whole)
        if multiprocessors >= output_tiles >= _BUSY_WHOLE * multiprocessors:
            return _with_tokens(whole, split=1)
    return None


def _in_shares(M: int, tiles: int, multiprocessors: int) -> GemmConfig:
    """Return settings for equal shares. Where tiles are few, many blocks share each: then tiles are small."""
    if M <= 32:
        return _with_tokens(32, blocks=2 if tiles >= multiprocessors else 1)
    few = 2 * tiles < multiprocessors
    sizes = (160, 128) if few and M <= 640 else (256, 192, 160)
    if sizes[0] >= M:
        return _with_tokens(_columns(M))
    # Whichever leaves fewest columns empty, of these the widest.
    return _with_tokens(min(sizes, key=lambda columns: -(-M // columns) * columns))


def _columns(tokens: int) -> int:
    """Return the fewest columns of a tile that hold `tokens` tokens, or the most there are."""
    return min((size for size in _RINGS if size >= tokens), default=max(_RINGS))


def _with_tokens(tokens: int, blocks: int = 1, split: int = 0, resident: int = 1) -> GemmConfig:
    span, depth, joint, stages = _RINGS[tokens]
    return GemmConfig(tokens, blocks, span, depth, joint, stages, split=split, resident=resident)


def most_tokens(N: int, K: int, axis: int) -> int:
    """Return up to how many tokens the GEMM was faster on an H200 than to dequantise the weight and use cuBLAS."""
    if axis == 0:
        return 512
    return 1024 if N * K < 1 << 25 else 1536 if N * K < 1 << 26 else 3072


def fitted(config: GemmConfig, bits: int, axis: int, group: int, K: int) -> GemmConfig:
    """Return `config` with whole chunks for spans, and less where K or shared memory do not suffice."""
    if axis == 0:
        # A lane holds 16 scales and zeros: too much for the registers of two blocks.
        config = replace(config, resident=1)
        if config.tokens > 16:
            # Results are stored for 32 tokens at a time.
            config = replace(config, tokens=-(-config.tokens // 32) * 32)
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
        elif config.split > 1:
            config = replace(config, split=config.split // 2)
        else:
            return replace(config, resident=1)
    # Every block of a cluster has a span.
    return replace(config, split=min(config.split, -(-K // (BLOCK_INPUTS * config.span))))
