// Vectors of 8 floats: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace {

struct Vector {
    typedef __m256 F;
    static constexpr int kWidth = 8, kRegisters = 16;

    static inline F zero() { return _mm256_setzero_ps(); }
    static inline F set1(float x) { return _mm256_set1_ps(x); }
    static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
    static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static inline float sum(F x) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }

    static inline F load(const float* p) { return _mm256_loadu_ps(p); }
    static inline F load(const BFloat16* p) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
    }
    static inline F load(const Float16* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static inline void store(BFloat16* p, F x) {
        const __m256i u = _mm256_castps_si256(x);
        const __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
        const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    }
    static inline void store(Float16* p, F x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }

    // What rounding took from a sum, in the upper half of its bits; NaN need not stay so, it is in the sum.
    static inline void store_lost(uint16_t* p, F x) {
        const __m256i rounded = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(0x8000));
        const __m256i top = _mm256_srli_epi32(rounded, 16);
        const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    }
    static inline void store_lost(uint16_t* p, F x, F y) {
        store_lost(p, x);
        store_lost(p + kWidth, y);
    }

    // 8 x 8 block of src, rows ld apart, transposed to dst: 4 x 4 inside the lanes, then the lanes themselves.
    static inline void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
        __m256 t[8];
#pragma GCC unroll 2
        for (int i = 0; i < 8; i += 4) {
            const __m256 r0 = load(src + i * ld_src), r1 = load(src + (i + 1) * ld_src);
            const __m256 r2 = load(src + (i + 2) * ld_src), r3 = load(src + (i + 3) * ld_src);
            const __m256 a = _mm256_unpacklo_ps(r0, r1), b = _mm256_unpackhi_ps(r0, r1);
            const __m256 c = _mm256_unpacklo_ps(r2, r3), d = _mm256_unpackhi_ps(r2, r3);
            t[i] = _mm256_shuffle_ps(a, c, 0x44);
            t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
            t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
            t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            store(dst + i * ld_dst, _mm256_permute2f128_ps(t[i], t[4 + i], 0x20));
            store(dst + (4 + i) * ld_dst, _mm256_permute2f128_ps(t[i], t[4 + i], 0x31));
        }
    }
};

}  // namespace

#include "tails.h"
