// bfloat16 and float16 as bits, converted one number at a time with rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

inline float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

inline float widen(Float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
    // Shifted into place the exponent is 112 too small; the product mends that, and subnormals with it.
    return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

inline void narrow(float x, float* p) { *p = x; }

inline void narrow(float x, BFloat16* p) {
    const uint32_t u = bits_of(x);
    const bool is_nan = (u & 0x7fffffff) > 0x7f800000;
    p->bits = is_nan ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline void narrow(float x, Float16* p) {
    const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) {
        p->bits = uint16_t(sign | 0x7e00);
    } else if (rest >= 0x477ff000) {  // rounds beyond 65504
        p->bits = uint16_t(sign | 0x7c00);
    } else if (rest < 0x38800000) {  // below 2^-14: adding 0.5 leaves the subnormal's bits at the end of the mantissa
        p->bits = uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
    } else {
        p->bits = uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
    }
}

}  // namespace
