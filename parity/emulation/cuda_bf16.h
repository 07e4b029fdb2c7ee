// bfloat16 on a CPU: the conversions that the kernels use, rounding to nearest, ties to even.
#pragma once
#include "emulation.h"

struct __nv_bfloat16 {
    std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
    return emulation::number_of(static_cast<std::uint32_t>(x.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16(float x) {
    const std::uint32_t bits = emulation::bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return {0x7fff};  // no number
    }
    return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
