// Vectors of 4 floats in the compiler's own terms: whatever the baseline of the architecture is.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.h"

namespace {

struct Vector {
    typedef float F __attribute__((vector_size(16)));
    static constexpr int kWidth = 4, kRegisters = 16;

    static inline F zero() { return F{0, 0, 0, 0}; }
    static inline F set1(float x) { return F{x, x, x, x}; }
    static inline F load(const float* p) {
        F x;
        memcpy(&x, p, sizeof x);
        return x;
    }
    static inline void store(float* p, F x) { memcpy(p, &x, sizeof x); }
    static inline F add(F a, F b) { return a + b; }
    static inline F sub(F a, F b) { return a - b; }
    static inline F mul(F a, F b) { return a * b; }
    static inline F fma(F a, F b, F c) { return a * b + c; }
    static inline float sum(F x) { return (x[0] + x[1]) + (x[2] + x[3]); }

    static inline F load(const BFloat16* p) { return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
    static inline F load(const Float16* p) { return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
    template <class E>
    static inline void store(E* p, F x) {
        for (int i = 0; i < kWidth; i++) narrow(x[i], p + i);
    }

    // What rounding took from a sum, in the upper half of its bits; NaN need not stay so, it is in the sum.
    static inline void store_lost(uint16_t* p, F x) {
        for (int i = 0; i < kWidth; i++) p[i] = uint16_t((bits_of(x[i]) + 0x8000) >> 16);
    }
    static inline void store_lost(uint16_t* p, F x, F y) {
        store_lost(p, x);
        store_lost(p + kWidth, y);
    }

    // 4 x 4 block of src, rows ld apart, transposed to dst.
    static inline void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
        for (int i = 0; i < kWidth; i++)
            for (int j = 0; j < kWidth; j++) dst[j * ld_dst + i] = src[i * ld_src + j];
    }
};

}  // namespace

#include "tails.h"
