// The 16-bit floats in integer arithmetic and doubles: exact, and rounded once as the GPU does.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

struct F16 {
    static constexpr int FRACTION = 10, BIAS = 15;
};
struct BF16 {
    static constexpr int FRACTION = 7, BIAS = 127;
};

namespace host {

template <class T>
inline double value_of(uint32_t bits) {
    constexpr int top = (1 << (15 - T::FRACTION)) - 1;  // the exponent of infinity and NaN
    const int exponent = bits >> T::FRACTION & top, fraction = bits & ((1 << T::FRACTION) - 1);
    double size;
    if (exponent == top) {
        size = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
        size = std::ldexp(fraction, 1 - T::BIAS - T::FRACTION);
    } else {
        size = std::ldexp(fraction + (1 << T::FRACTION), exponent - T::BIAS - T::FRACTION);
    }
    return bits & 0x8000 ? -size : size;
}

// To nearest, ties to even.
template <class T>
inline uint32_t bits_of(double value) {
    constexpr uint32_t infinity = ((1u << (15 - T::FRACTION)) - 1) << T::FRACTION;
    if (std::isnan(value)) return 0x7fff;
    const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
    const double size = std::fabs(value);
    if (std::isinf(size)) return sign | infinity;
    if (size == 0) return sign;
    int exponent = 0;
    std::frexp(size, &exponent);
    exponent = std::max(exponent - 1, 1 - T::BIAS);
    const double steps = std::nearbyint(std::ldexp(size, T::FRACTION - exponent));
    // A carry out of the fraction moves into the exponent, and out of the largest exponent into infinity.
    const uint64_t bits = (uint64_t(exponent + T::BIAS - 1) << T::FRACTION) + uint64_t(steps);
    return sign | uint32_t(bits < infinity ? bits : infinity);
}

// a b + c for 16-bit operands: the product is exact in a double, the sum is rounded to odd, which a second rounding to
// fewer bits does not notice.
inline double sum_to_odd(double product, double c) {
    const double sum = product + c;
    if (!std::isfinite(sum)) return sum;
    const double part = sum - product;
    const double rest = (product - (sum - part)) + (c - part);
    uint64_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    if (rest == 0 || bits & 1) return sum;
    // Towards the rest, which is less than one step away.
    return std::nextafter(sum, rest > 0 ? INFINITY : -INFINITY);
}

template <class T>
inline uint32_t fma16(uint32_t a, uint32_t b, uint32_t c) {
    return bits_of<T>(sum_to_odd(value_of<T>(a) * value_of<T>(b), value_of<T>(c)));
}

template <class T>
inline double half_of(uint32_t pair, int half) {
    return value_of<T>(pair >> (16 * half) & 0xffff);
}

}  // namespace host
