// Vectors of 16 floats: AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace {

struct Vector {
    typedef __m512 F;
    static constexpr int kWidth = 16, kRegisters = 32;

    static inline F zero() { return _mm512_setzero_ps(); }
    static inline F set1(float x) { return _mm512_set1_ps(x); }
    static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
    static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static inline float sum(F x) {
        const __m256 high = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xff, _mm512_castps_pd(x), 1));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), high);
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }

    static inline F load(const float* p) { return _mm512_loadu_ps(p); }
    static inline F load(const BFloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static inline F load(const Float16* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static inline void store(BFloat16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(x)); }
    static inline void store(Float16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_float16(x)); }

    static inline F widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
    static inline __m256i to_float16(F x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
    static inline __m256i to_bfloat16(F x) {
        const __m512i u = _mm512_castps_si512(x);
        const __m512i even = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
        rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }

    // What rounding took from a sum, in the upper half of its bits; NaN need not stay so, it is in the sum.
    static inline void store_lost(uint16_t* p, F x) {
#if defined(__AVX512BF16__)
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x);
#else
        const __m512i up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
        const __m256i rounded = _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
    }

    // 16 x 16 block of src, rows ld apart, transposed to dst: 4 x 4 inside the lanes, then the lanes themselves.
    static inline void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
        __m512 r[16], t[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(src + i * ld_src);
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4) {
            const __m512 a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
            const __m512 c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
            t[i] = _mm512_shuffle_ps(a, c, 0x44);
            t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
            t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
            t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {  // t[4 g + i] holds columns i, 4 + i, 8 + i, 12 + i of the rows 4 g ..
            const __m512 a = _mm512_shuffle_f32x4(t[i], t[4 + i], 0x88), b = _mm512_shuffle_f32x4(t[i], t[4 + i], 0xdd);
            const __m512 c = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0x88);
            const __m512 d = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0xdd);
            _mm512_storeu_ps(dst + i * ld_dst, _mm512_shuffle_f32x4(a, c, 0x88));
            _mm512_storeu_ps(dst + (4 + i) * ld_dst, _mm512_shuffle_f32x4(b, d, 0x88));
            _mm512_storeu_ps(dst + (8 + i) * ld_dst, _mm512_shuffle_f32x4(a, c, 0xdd));
            _mm512_storeu_ps(dst + (12 + i) * ld_dst, _mm512_shuffle_f32x4(b, d, 0xdd));
        }
    }
};

inline __mmask16 first(int n) { return __mmask16((1u << n) - 1); }

inline Vector::F load_tail(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline Vector::F load_tail(const BFloat16* p, int n) { return Vector::widen(_mm256_maskz_loadu_epi16(first(n), p)); }
inline Vector::F load_tail(const Float16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
inline void store_tail(float* p, Vector::F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
inline void store_tail(BFloat16* p, Vector::F x, int n) {
    _mm256_mask_storeu_epi16(p, first(n), Vector::to_bfloat16(x));
}
inline void store_tail(Float16* p, Vector::F x, int n) { _mm256_mask_storeu_epi16(p, first(n), Vector::to_float16(x)); }

}  // namespace
