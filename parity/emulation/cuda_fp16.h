// float16 on a CPU: the conversions that the kernels use, rounding to nearest, ties to even.
#pragma once
#include "emulation.h"

struct __half {
    std::uint16_t bits;
};

inline float __half2float(__half x) {
    const std::uint32_t magnitude = x.bits & 0x7fffu;
    // Its bits, moved to float32's places, are a number 2^112 too small, subnormal or not.
    const float shifted = emulation::number_of(magnitude << 13) * 0x1p112f;
    const std::uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0;  // infinite, or no number
    const std::uint32_t sign = (x.bits & 0x8000u) << 16;
    return emulation::number_of(emulation::bits_of(shifted) | special | sign);
}

inline __half __float2half(float x) {
    const std::uint32_t bits = emulation::bits_of(x), magnitude = bits & 0x7fffffffu;
    std::uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;  // no number
    } else if (magnitude >= 0x47800000u) {
        half = 0x7c00u;  // 65536 or more
    } else if (magnitude < 0x38800000u) {
        // Subnormal: next to 0.5, float32's last bit is worth float16's smallest number.
        half = emulation::bits_of(emulation::number_of(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    return {static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000u))};
}
