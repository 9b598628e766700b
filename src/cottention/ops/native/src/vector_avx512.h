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
        const __m256i rounded = _mm512_cvtepi32_epi16(_mm512_srli_epi32(to_upper_half(x), 16));
#endif
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
    }
    // The same of two vectors side by side.
    static inline void store_lost(uint16_t* p, F x, F y) {
#if defined(__AVX512BF16__)
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y, x);
#else
        const __m512i i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i places = _mm512_add_epi32(_mm512_mullo_epi32(i, _mm512_set1_epi32(4 | 4 << 16)),
                                                _mm512_set1_epi32(1 | 3 << 16));  // of every upper half
        const __m512i both = _mm512_permutex2var_epi16(to_upper_half(x), places, to_upper_half(y));
#endif
        _mm512_storeu_si512(p, both);
    }
    static inline __m512i to_upper_half(F x) {
        return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    }

    // 16 x 16 block of src, rows ld apart, transposed to dst: four columns of rows i, 4 + i, 8 + i and 12 + i lie in a
    // vector, so that 4 x 4 blocks inside the lanes are all that is to be transposed.
    static inline void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
#pragma GCC unroll 4
        for (int j = 0; j < 16; j += 4, dst += 4 * ld_dst) {
            const float* from = src + j;
            const __m512 r0 = every_fourth(from, ld_src), r1 = every_fourth(from + ld_src, ld_src);
            const __m512 r2 = every_fourth(from + 2 * ld_src, ld_src), r3 = every_fourth(from + 3 * ld_src, ld_src);
            const __m512 a = _mm512_unpacklo_ps(r0, r1), b = _mm512_unpackhi_ps(r0, r1);
            const __m512 c = _mm512_unpacklo_ps(r2, r3), d = _mm512_unpackhi_ps(r2, r3);
            _mm512_storeu_ps(dst, _mm512_shuffle_ps(a, c, 0x44));
            _mm512_storeu_ps(dst + ld_dst, _mm512_shuffle_ps(a, c, 0xee));
            _mm512_storeu_ps(dst + 2 * ld_dst, _mm512_shuffle_ps(b, d, 0x44));
            _mm512_storeu_ps(dst + 3 * ld_dst, _mm512_shuffle_ps(b, d, 0xee));
        }
    }
    static inline F every_fourth(const float* p, int64_t ld) {
        F x = _mm512_castps128_ps512(_mm_loadu_ps(p));
        x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 4 * ld), 1);
        x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 8 * ld), 2);
        return _mm512_insertf32x4(x, _mm_loadu_ps(p + 12 * ld), 3);
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
