// Codes and scales on their way to a warp of gemv.cu.
#ifndef HQQ_GEMV_WEIGHTS_CUH
#define HQQ_GEMV_WEIGHTS_CUH

#include "gemv_shape.cuh"

// One slice of TILES row tiles: any codes past the last input, where x is zero, and another tile's past the last tile.
struct Weights {
    uint4 codes[TILES][CHUNKS][LOADS] = {};
    uint2 scales[TILES][SETS];  // axis=1: scale and zero of rows g and g + 8, for the group of the lane's slot

    // Chooses the slice that begins at block `block0` of the inputs. Addresses change with the slice only.
    HQQ_INLINE void aim(const Arguments& p, const Lane& lane, int block0) {
        from_block = block0;
        chunks = (p.blocks - block0) / Chunk<BITS>::blocks;
        codes_from = p.codes + int64_t(block0 / Chunk<BITS>::blocks) * (512 * LOADS) + threadIdx.x % 32 * 16;
        if constexpr (AXIS == 1 && FEW_SETS) {
#pragma unroll
            for (int set = 0; set < SETS; ++set) meta_from[set] = meta_of_slot(p, lane, set);
        }
    }

    // Chooses the row tiles that begin with `tile0`; no codes of theirs are fetched unless `wanted`.
    HQQ_INLINE void aim_at_tiles(const Arguments& p, int tile0, bool wanted) {
        const int tile_bytes = p.blocks / Chunk<BITS>::blocks * (512 * LOADS);
        wanted_chunks = wanted ? chunks : 0;
        // Opaque, or the compiler adds up each chunk's address from its parts anew.
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            tile_from[tile] = opaque(codes_from + int64_t(p.tile(tile0, tile)) * tile_bytes);
    }

    HQQ_INLINE void fetch_codes(int chunk) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
                if (chunk < wanted_chunks)
                    codes[tile][chunk][i] = ldg128_stream(tile_from[tile] + 512 * (LOADS * chunk + i));
    }

    // axis=1: asks for the scales and zeros for set `set` of the slice; any ones past the last row tile.
    HQQ_INLINE void fetch_scales(const Arguments& p, const Lane& lane, int tile0, int set) {
        const unsigned char* from = FEW_SETS ? meta_from[set] : meta_of_slot(p, lane, set);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            scales[tile][set] = ldg64(from + int64_t(p.tile(tile0, tile)) * (p.groups * 64));
    }

    // axis=0: scales and zeros of the row tiles' group go to `row_meta`, in shared memory.
    HQQ_INLINE void copy_scales(const Arguments& p, int tile0, unsigned char* row_meta) {
        const unsigned char* from = p.meta + int64_t(tile0 / p.groups) * p.blocks * 256;
        const int here = threadIdx.x % 32 * 16;
#pragma unroll
        for (int i = 0; i < BLOCKS * 256; i += 512) {
            const int byte = from_block * 256 + i + here;
            cp_async16_zfill(smem_u32(row_meta) + i + here, from + byte, byte < p.blocks * 256 ? 16 : 0);
        }
        cp_async_commit();
    }

    HQQ_INLINE void fetch_all_scales(const Arguments& p, const Lane& lane, int tile0, unsigned char* row_meta) {
        if constexpr (AXIS == 0) {
            copy_scales(p, tile0, row_meta);
        } else {
#pragma unroll
            for (int set = 0; set < SETS; ++set) fetch_scales(p, lane, tile0, set);
        }
    }

private:
    static constexpr bool FEW_SETS = SETS <= 4;  // whose addresses are kept

    const unsigned char* codes_from;
    const unsigned char* tile_from[TILES];
    const unsigned char* meta_from[SETS];
    int chunks, wanted_chunks, from_block;

    // axis=1: where the first row tile has the scales for set `set` of the slice.
    HQQ_INLINE const unsigned char* meta_of_slot(const Arguments& p, const Lane& lane, int set) const {
        int group = 0;
        if constexpr (GROUP != 0) {
            const int part = set * SLOTS + lane.c / COLUMN_TOKENS;
            group = PARTS > 1 ? from_block * PARTS + part : (from_block + part) / (GROUP >= 64 ? GROUP / 64 : 1);
            group = min(group, p.groups - 1);
        }
        return p.meta + group * 64 + lane.g * 8;
    }
};

#endif
