// From the sums of the warps of gemv.cu to results.
#ifndef HQQ_GEMV_RESULTS_CUH
#define HQQ_GEMV_RESULTS_CUH

#include "gemv_shape.cuh"

// The sum over warps and slots of row `row` of a row group for one token.
HQQ_INLINE float row_sum(const float* group_sums, int row, int token) {
    const auto of_slots = [&](const float* sums) {
        const float4 four = *reinterpret_cast<const float4*>(sums + token / 4 * 4);
        const float pairs[4] = {four.x, four.y, four.z, four.w};
        if constexpr (COLUMN_TOKENS == 1) return (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
        if constexpr (COLUMN_TOKENS == 2) return token == 0 ? pairs[0] + pairs[2] : pairs[1] + pairs[3];
        const float first = token % 2 == 0 ? pairs[0] : pairs[1], second = token % 2 == 0 ? pairs[2] : pairs[3];
        return token % 4 < 2 ? first : second;
    };
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += of_slots(group_sums + warp * WARP_SUMS + row * ROW_SUMS);
    return sum;
}

// Writes the results of `count` row groups whose sums are complete, every `step`-th from `group0` on.
HQQ_INLINE void write_results(const Arguments& p, const Shared& shared, int group0, int step, int count) {
    constexpr int OUTPUTS = GATED ? ROWS / 2 : ROWS;
    const int tokens = TOKENS == 1 ? 1 : p.M, N = GATED ? p.N / 2 : p.N;
    for (int i = threadIdx.x; i < count * OUTPUTS * tokens; i += WARPS * 32) {
        const int row = i % OUTPUTS, token = i / OUTPUTS % tokens, group = i / (OUTPUTS * tokens);
        const int first_tile = p.first_tile(group0 + group * step), tile = first_tile + row / 16;
        if (tile >= p.tiles) continue;
        const int4 place = p.rows[tile];
        if (row % 16 >= place.z) continue;
        const int64_t feature = place.x + int64_t(place.y) * (row % 16);
        float by_norm = 1.0f;
        if constexpr (NORMED) {
            float square = 0.0f;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) square += shared.squares[warp * TOKENS + token];
            by_norm = rsqrtf(square / static_cast<float>(p.K) + p.eps);
        }
        const float* group_sums = shared.sums + group * WARPS * WARP_SUMS;
        const auto output = [&](int its_row, int64_t its_feature) {
            float sum = row_sum(group_sums, its_row, token);
            if constexpr (AXIS == 0) sum = ldexpf(sum, -place.w);
            if constexpr (NORMED) sum *= by_norm;
            return p.bias ? sum + low_float<T>(ldg16(p.bias + its_feature * 2)) : sum;
        };
        float value = output(row, feature);
        if constexpr (GATED) value = value / (1.0f + __expf(-value)) * output(row + 16, feature + N);
        const int64_t at = int64_t(token) * N + feature;
        if (p.residual) value += low_float<T>(ldg16(p.residual + at * 2));
        *reinterpret_cast<unsigned short*>(p.y + at * 2) = static_cast<unsigned short>(pack2<T>(value, 0.0f));
    }
}

#endif
