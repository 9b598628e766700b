// Vectors of 4 floats: NEON of AArch64.
#pragma once

#include <arm_neon.h>

#include "convert.h"

namespace {

struct Vector {
    typedef float32x4_t F;
    static constexpr int kWidth = 4, kRegisters = 32;

    static inline F zero() { return vdupq_n_f32(0); }
    static inline F set1(float x) { return vdupq_n_f32(x); }
    static inline F add(F a, F b) { return vaddq_f32(a, b); }
    static inline F sub(F a, F b) { return vsubq_f32(a, b); }
    static inline F mul(F a, F b) { return vmulq_f32(a, b); }
    static inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static inline float sum(F x) { return vaddvq_f32(x); }

    static inline F load(const float* p) { return vld1q_f32(p); }
    static inline F load(const BFloat16* p) {
        return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
    }
    static inline F load(const Float16* p) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
    }
    static inline void store(float* p, F x) { vst1q_f32(p, x); }
    static inline void store(BFloat16* p, F x) {
        const uint32x4_t u = vreinterpretq_u32_f32(x);
        const uint32x4_t even = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(even, vdupq_n_u32(0x7fff)));
        const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
        vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16));
    }
    static inline void store(Float16* p, F x) {
        vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(x)));
    }

    // What rounding took from a sum, in the upper half of its bits; NaN need not stay so, it is in the sum.
    static inline void store_lost(uint16_t* p, F x) {
        vst1_u16(p, vshrn_n_u32(vaddq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x8000)), 16));
    }
    static inline void store_lost(uint16_t* p, F x, F y) {
        store_lost(p, x);
        store_lost(p + kWidth, y);
    }

    // 4 x 4 block of src, rows ld apart, transposed to dst.
    static inline void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
        const float32x4x2_t a = vtrnq_f32(load(src), load(src + ld_src));
        const float32x4x2_t b = vtrnq_f32(load(src + 2 * ld_src), load(src + 3 * ld_src));
        store(dst, vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])));
        store(dst + ld_dst, vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])));
        store(dst + 2 * ld_dst, vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])));
        store(dst + 3 * ld_dst, vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1])));
    }
};

}  // namespace

#include "tails.h"
