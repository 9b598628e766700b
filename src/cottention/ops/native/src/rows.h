// Tokens between the caller's memory and scratch: widened, normalised, weighted, transposed, and back.
//
// Scratch rows are padded with zeros to whole vectors, and rows to a whole vector of tokens. Padded tokens are read as
// zeros whatever stands there, and written as exact zeros.
#pragma once

#include <cstdint>

namespace {

// Below this norm a query or key counts as zero: what the published weights were trained with.
constexpr float kMinNorm = 1e-12f;
constexpr int64_t kMaxChunk = 128;

template <class P>
struct PointeeOf;
template <class E>
struct PointeeOf<E*> {
    typedef E type;
};
template <class P>
using Pointee = typename PointeeOf<P>::type;

// Call function with a null pointer of the element's type.
template <class F>
inline void with_element(int64_t dtype, F function) {
    if (dtype == 0) {
        function(static_cast<float*>(nullptr));
    } else if (dtype == 1) {
        function(static_cast<BFloat16*>(nullptr));
    } else {
        function(static_cast<Float16*>(nullptr));
    }
}

inline void clear(float* p, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = 0;
}

template <class E>
inline void clear_elements(E* p, int64_t n) {
    for (int64_t i = 0; i < n; i++) narrow(0.0f, p + i);
}

inline bool is_padding(const uint8_t* mask, int64_t i) { return mask != nullptr && mask[i] == 0; }

// Copy D numbers, zeros up to a whole vector.
template <class E>
inline void load_row(float* dst, const E* src, int64_t D) {
    int64_t d = 0;
    for (; d + kWidth <= D; d += kWidth) Vector::store(dst + d, Vector::load(src + d));
    if (d < D) Vector::store(dst + d, load_tail(src + d, int(D - d)));
}

// The same, and their sum of squares.
template <class E>
inline float load_row_square(float* dst, const E* src, int64_t D) {
    Vector::F square = Vector::zero();
    int64_t d = 0;
    for (; d + kWidth <= D; d += kWidth) {
        const Vector::F x = Vector::load(src + d);
        square = Vector::fma(x, x, square);
        Vector::store(dst + d, x);
    }
    if (d < D) {
        const Vector::F x = load_tail(src + d, int(D - d));
        square = Vector::fma(x, x, square);
        Vector::store(dst + d, x);
    }
    return Vector::sum(square);
}

template <class E>
inline void store_row(E* dst, const float* src, int64_t D) {
    int64_t d = 0;
    for (; d + kWidth <= D; d += kWidth) Vector::store(dst + d, Vector::load(src + d));
    if (d < D) store_tail(dst + d, Vector::load(src + d), int(D - d));
}

// dst += src
template <class E>
inline void add_row(float* dst, const E* src, int64_t D) {
    int64_t d = 0;
    for (; d + kWidth <= D; d += kWidth) Vector::store(dst + d, Vector::add(Vector::load(dst + d), Vector::load(src + d)));
    if (d < D) Vector::store(dst + d, Vector::add(Vector::load(dst + d), load_tail(src + d, int(D - d))));
}

inline void scale_row(float* row, float factor, int64_t padded) {
    const Vector::F f = Vector::set1(factor);
    for (int64_t d = 0; d < padded; d += kWidth) Vector::store(row + d, Vector::mul(Vector::load(row + d), f));
}

inline float dot(const float* a, const float* b, int64_t padded) {
    Vector::F sum = Vector::zero();
    for (int64_t d = 0; d < padded; d += kWidth) sum = Vector::fma(Vector::load(a + d), Vector::load(b + d), sum);
    return Vector::sum(sum);
}

// n tokens of one head in scratch.
struct Block {
    float* data;
    int64_t D, ld;  // numbers of a token, and padded
    Block(float* data, int64_t D) : data(data), D(D), ld(round_up(D, kWidth)) {}
    float* row(int64_t i) const { return data + i * ld; }
};

inline void clear_rows_after(const Block& block, int64_t n) {
    clear(block.row(n), (round_up(n, kWidth) - n) * block.ld);
}

// Rows as they are.
inline void load_rows(const Block& block, const Rows& rows, int64_t dtype, int64_t t, int64_t n, const uint8_t* mask) {
    with_element(dtype, [&](auto* e) {
        typedef Pointee<decltype(e)> E;
        const E* src = static_cast<const E*>(rows.data) + t * rows.stride;
        for (int64_t i = 0; i < n; i++) {
            if (is_padding(mask, t + i)) {
                clear(block.row(i), block.ld);
            } else {
                load_row(block.row(i), src + i * rows.stride, block.D);
            }
        }
    });
    clear_rows_after(block, n);
}

// What the gradient of a unit vector needs again: x = factor * source, and radial, see store_unit_gradient.
struct UnitScale {
    float factor[kMaxChunk], radial[kMaxChunk];

    // Of n rows, from the squares of their norms. Rows together, because roots and quotients take long one by one.
    void set(const float* square, const float* weight, int64_t n) {
        for (int64_t i = 0; i < n; i++) {
            const float norm = __builtin_sqrtf(square[i]);
            const bool is_clamped = norm < kMinNorm;  // false for NaN, which stays
            factor[i] = 1 / (is_clamped ? kMinNorm : norm);
            radial[i] = is_clamped ? 0.0f : 1.0f;
        }
        for (int64_t i = 0; i < n && weight != nullptr; i++) {
            factor[i] *= weight[i];
            radial[i] /= weight[i] * weight[i];
        }
    }
};

// Rows as they are, and the squares of their norms in `scale`.
inline void load_rows_square(const Block& block, const Rows& rows, int64_t dtype, int64_t t, int64_t n,
                             const uint8_t* mask, UnitScale& scale) {
    with_element(dtype, [&](auto* e) {
        typedef Pointee<decltype(e)> E;
        const E* src = static_cast<const E*>(rows.data) + t * rows.stride;
        for (int64_t i = 0; i < n; i++) {
            scale.factor[i] = 0;
            if (is_padding(mask, t + i)) {
                clear(block.row(i), block.ld);
            } else {
                scale.factor[i] = load_row_square(block.row(i), src + i * rows.stride, block.D);
            }
        }
    });
    clear_rows_after(block, n);
}

// Those rows divided by their norm and multiplied by their weight; null weights are 1.
inline void make_unit(const Block& block, int64_t n, const float* weight, UnitScale& scale) {
    scale.set(scale.factor, weight, n);
    for (int64_t i = 0; i < n; i++) scale_row(block.row(i), scale.factor[i], block.ld);
}

// Both: where nothing else has to be read in between.
inline void load_unit_rows(const Block& block, const Rows& rows, int64_t dtype, int64_t t, int64_t n,
                           const uint8_t* mask, const float* weight, UnitScale& scale) {
    load_rows_square(block, rows, dtype, t, n, mask, scale);
    make_unit(block, n, weight, scale);
}

// Rows to their tokens, or added to what stands there; the block is left with what is stored.
inline void store_rows(const Rows& rows, int64_t dtype, int64_t t, int64_t n, const uint8_t* mask, const Block& block,
                       bool adds = false) {
    with_element(dtype, [&](auto* e) {
        typedef Pointee<decltype(e)> E;
        E* dst = static_cast<E*>(rows.data) + t * rows.stride;
        for (int64_t i = 0; i < n; i++) {
            if (is_padding(mask, t + i)) {
                clear_elements(dst + i * rows.stride, block.D);
            } else {
                if (adds) add_row(block.row(i), dst + i * rows.stride, block.D);
                store_row(dst + i * rows.stride, block.row(i), block.D);
            }
        }
    });
}

// From g, the gradient of x = w x_hat, that of the rows that x came from: w (g - x_hat (x_hat . g)) / ||row||, which is
// factor (g - radial x (x . g)) with radial = 1 / w^2. Where the norm was clamped radial is 0. x . g go to `inner`
// where that is wanted.
inline void store_unit_gradient(const Rows& rows, int64_t dtype, int64_t t, int64_t n, const uint8_t* mask,
                                const Block& gradient, const Block& x, const UnitScale& scale, bool adds = false,
                                float* inner = nullptr) {
    for (int64_t i = 0; i < n; i++) {
        float* g = gradient.row(i);
        const float* row = x.row(i);
        const float product = scale.radial[i] == 0 && inner == nullptr ? 0 : dot(row, g, x.ld);
        if (inner != nullptr) inner[i] = product;
        const Vector::F along = Vector::set1(-scale.radial[i] * (scale.radial[i] == 0 ? 0 : product));
        const Vector::F factor = Vector::set1(scale.factor[i]);
        for (int64_t d = 0; d < x.ld; d += kWidth) {
            const Vector::F across = Vector::fma(along, Vector::load(row + d), Vector::load(g + d));
            Vector::store(g + d, Vector::mul(across, factor));
        }
    }
    store_rows(rows, dtype, t, n, mask, gradient, adds);
}

// dst [columns of src, ld] = src^T for n rows; rows beyond n, up to a whole vector, must hold zeros.
inline void transpose_rows(float* dst, int64_t ld, const float* src, int64_t ld_src, int64_t n) {
    for (int64_t i = 0; i < n; i += kWidth)
        for (int64_t d = 0; d < ld_src; d += kWidth)
            Vector::transpose(src + i * ld_src + d, ld_src, dst + d * ld + i, ld);
}

inline int64_t count_real(const uint8_t* mask, int64_t start, int64_t n) {
    if (mask == nullptr) return n;
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) count += mask[start + i] != 0;
    return count;
}

// log2 of integers from 1 on, to 1e-13: the exponent, and the odd series of (m - 1) / (m + 1) for the mantissa.
inline double log2_of(double c) {
    uint64_t u;
    memcpy(&u, &c, sizeof u);
    const uint64_t shifted = u - 0x3fe6a09e667f3bcd;  // bits of sqrt(1/2): mantissas from there to sqrt(2)
    const double exponent = double(int64_t(shifted) >> 52);
    u -= shifted & 0xfff0000000000000;
    double m;
    memcpy(&m, &u, sizeof m);
    const double f = (m - 1) / (m + 1), s = f * f;
    double sum = 1.0 / 17;
    sum = sum * s + 1.0 / 15;
    sum = sum * s + 1.0 / 13;
    sum = sum * s + 1.0 / 11;
    sum = sum * s + 1.0 / 9;
    sum = sum * s + 1.0 / 7;
    sum = sum * s + 1.0 / 5;
    sum = sum * s + 1.0 / 3;
    sum = sum * s + 1.0;
    return exponent + 2.8853900817779268 * f * sum;
}

// 2 ** y for -1000 < y <= 0, to 1e-12.
inline double exp2_of(double y) {
    const double shifted = y + 0x1.8p52;  // rounds y to an integer in the last bits
    uint64_t u;
    memcpy(&u, &shifted, sizeof u);
    const double r = (y - (shifted - 0x1.8p52)) * 0.6931471805599453;
    double sum = 1.0 / 3628800;
    sum = sum * r + 1.0 / 362880;
    sum = sum * r + 1.0 / 40320;
    sum = sum * r + 1.0 / 5040;
    sum = sum * r + 1.0 / 720;
    sum = sum * r + 1.0 / 120;
    sum = sum * r + 1.0 / 24;
    sum = sum * r + 1.0 / 6;
    sum = sum * r + 0.5;
    sum = sum * r + 1.0;
    sum = sum * r + 1.0;
    uint64_t power = (u << 52) + 0x3ff0000000000000;
    double scale;
    memcpy(&scale, &power, sizeof scale);
    return sum * scale;
}

// w_j = c_j ** -p and log(c_j) of n tokens from t on, after `before` real ones. A count of 0 is taken as 1. With decay
// the weights are w_j 2 ** -decay_j.
struct Weights {
    float weight[kMaxChunk], log_count[kMaxChunk];
    bool divides, weighs;

    const float* get() const { return weighs ? weight : nullptr; }

    void set(const Divisor& divisor, const uint8_t* mask, int64_t t, int64_t n, int64_t before,
             const double* decay = nullptr) {
        divides = divisor.divides;
        weighs = divides || decay != nullptr;
        if (!divides) {
            for (int64_t i = 0; i < n && weighs; i++) weight[i] = float(exp2_of(-decay[i]));
            return;
        }
        double count[kMaxChunk], exponent[kMaxChunk];
        int64_t c = divisor.constant ? divisor.count : before;
        for (int64_t i = 0; i < n; i++) {
            if (!divisor.constant) c += !is_padding(mask, t + i);
            count[i] = c < 1 ? 1.0 : double(c);
        }
        for (int64_t i = 0; i < n; i++) {
            const double log2_count = log2_of(count[i]);
            exponent[i] = -divisor.p * log2_count;
            log_count[i] = float(0.6931471805599453 * log2_count);
        }
        for (int64_t i = 0; i < n && decay != nullptr; i++) exponent[i] -= decay[i];
        for (int64_t i = 0; i < n; i++) weight[i] = float(exp2_of(exponent[i]));
    }
};

}  // namespace
