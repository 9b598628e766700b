// Decay and erase in a tile: what is left at a token of what was written before it, and how far keys overwrite.
//
//     W_ij = exp(G_i - G_j) for j <= i      G the running sum of log_decay inside the tile
//
// G is a sum of doubles: behind a strong decay its differences keep all digits of a float. They are taken before exp, so
// nothing overflows.
#pragma once

#include "passes.h"

namespace {

// exp(x) for x <= 0, to the last digits of a float; 0 where it would not be a normal number.
inline float exp_of(float x) {
    const float bounded = x < -87.0f ? -87.0f : x;
    const float shifted = bounded * 1.44269504f + 0x1.8p23f;  // rounds to an integer in the last bits
    const float n = shifted - 0x1.8p23f;
    const float r = (bounded - n * 0.693145752f) - n * 1.42860677e-6f;
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    const float result = sum * float_of((bits_of(shifted) << 23) + 0x3f800000);
    return x < -87.0f ? 0.0f : result;
}

// Of less than this exp is zero; -inf is taken as it.
constexpr float kLeastLogDecay = -1000.0f;

struct Gates {
    float since[kMaxChunk];   // exp(G_i), what is left at i of the state before the tile
    float to_end[kMaxChunk];  // exp(G_n - G_j), what is left of j after the tile
    float beta[kMaxChunk];    // 0 at padding
    float whole;              // what is left of the state after the tile
    bool decays;

    // Of n tokens from t on. `weight`, where there is decay: W on and below the diagonal, in rows of ld.
    void set(const Range& range, int64_t t, int64_t n, float* weight, int64_t ld) {
        decays = range.log_decay.data != nullptr;
        whole = 1;
        for (int64_t i = 0; i < n; i++)
            beta[i] = is_padding(range.key_mask, t + i) ? 0.0f : range.beta.data[(t + i) * range.beta.stride];
        if (!decays) return;
        double sum[kMaxChunk], all = 0;
        for (int64_t i = 0; i < n; i++) {
            const float decay =
                is_padding(range.key_mask, t + i) ? 0.0f : range.log_decay.data[(t + i) * range.log_decay.stride];
            all += decay < kLeastLogDecay ? kLeastLogDecay : decay;
            sum[i] = all;
        }
        for (int64_t i = n; i < round_up(n, kWidth); i++) sum[i] = all;
        for (int64_t i = 0; i < n; i++) since[i] = exp_of(float(sum[i]));
        for (int64_t i = 0; i < n; i++) to_end[i] = exp_of(float(all - sum[i]));
        whole = since[n - 1];
        if (all > kWeakSum) {
            weigh_as_product(weight, ld, n, sum);
        } else {
            for (int64_t i = 0; i < n; i++) weigh_row(weight + i * ld, sum, sum[i], round_up(i + 1, kWidth));
        }
    }

  private:
    // Above it exp(G_i) and exp(-G_j) are both far from the ends of float, and their product has all its digits.
    static constexpr double kWeakSum = -50;

    static inline void weigh_as_product(float* weight, int64_t ld, int64_t n, const double* sum) {
        float left[kMaxChunk], inverse[kMaxChunk];
        for (int64_t i = 0; i < round_up(n, kWidth); i++) left[i] = float(exp2_of(1.4426950408889634 * sum[i]));
        for (int64_t i = 0; i < round_up(n, kWidth); i++) inverse[i] = 1 / left[i];
        for (int64_t i = 0; i < n; i++) {
            const Vector::F at = Vector::set1(left[i]);
            for (int64_t j = 0; j <= i; j += kWidth)
                Vector::store(weight + i * ld + j, Vector::mul(at, Vector::load(inverse + j)));
        }
    }

    static inline void weigh_row(float* row, const double* sum, double at, int64_t width) {
        for (int64_t j = 0; j < width; j++) {
            const float between = float(at - sum[j]);
            row[j] = exp_of(between > 0 ? 0.0f : between);  // NaN stays NaN
        }
    }
};

// A lower triangle times the weights, rows times their factors; both are 1 where they are null.
inline void weigh_lower(float* scores, const float* weight, const float* factors, float sign, int64_t ld, int64_t n) {
    if (weight == nullptr && factors == nullptr && sign == 1) return;
    for (int64_t i = 0; i < n; i++) {
        const Vector::F factor = Vector::set1(factors == nullptr ? sign : sign * factors[i]);
        for (int64_t j = 0; j <= i; j += kWidth) {
            const int64_t at = i * ld + j;
            const Vector::F by = weight == nullptr ? factor : Vector::mul(factor, Vector::load(weight + at));
            Vector::store(scores + at, Vector::mul(Vector::load(scores + at), by));
        }
    }
}

inline const auto keep_all = [](int64_t, int64_t, int, Product&) {};

// What is left of a sum, with what rounding takes from it.
inline void decay_sum(Sum& sum, float left) {
    if (left == 1 || sum.is_zero) return;
    const Vector::F factor = Vector::set1(left), minus = Vector::set1(-1);
    for (int64_t i = 0; i < round_up(sum.K, kWidth) * sum.ld; i += kWidth) {
        const Vector::F before = Vector::load(sum.data + i), after = Vector::mul(before, factor);
        const Vector::F rest = Vector::fma(before, factor, Vector::mul(minus, after));
        Vector::store(sum.data + i, after);
        Vector::store_lost(sum.lost + i, Vector::fma(load_lost(sum.lost + i), factor, rest));
    }
}

// dst rows = src rows, each times its factor and `sign`; null factors are 1.
inline void scale_rows(const Block& dst, const Block& src, const float* factors, float sign, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const Vector::F factor = Vector::set1(factors == nullptr ? sign : sign * factors[i]);
        for (int64_t d = 0; d < src.ld; d += kWidth)
            Vector::store(dst.row(i) + d, Vector::mul(Vector::load(src.row(i) + d), factor));
    }
}

}  // namespace
