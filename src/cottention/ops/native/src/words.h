// Matrices of bfloat16 as the dot product of AVX512-BF16 takes them, and the way of tokens into them and back.
//
// A 32-bit word holds a pair of neighbours along the index that is summed over, so a matrix is needed as rows (pairs
// along the row), transposed rows, or with its rows interleaved (pairs of rows). Tokens are bfloat16 already: a row of
// them is a row of words, 32 numbers to a vector.
#pragma once

#include "passes.h"

namespace {

struct DotPairs {
    static inline Vector::F apply(Vector::F a, Vector::F b, Vector::F c) {
        return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
    }
};

constexpr int64_t kPairWidth = 2 * kWidth;

inline int64_t pairs(int64_t n) { return (n + 1) / 2; }

// A matrix of words.
struct Words {
    float* data;
    int64_t ld;
    float* row(int64_t i) const { return data + i * ld; }
    Product left(int64_t depth) const { return {data, ld, 1, nullptr, 0, depth}; }
    Product left_transposed(int64_t depth) const { return {data, 1, ld, nullptr, 0, depth}; }
};

inline Product product(Product left, const Words& right) {
    left.b = right.data;
    left.ld = right.ld;
    return left;
}

// Rows of D numbers as pairs: D / 2 words, padded so that they can be transposed.
inline Words take_rows(Scratch& scratch, int64_t n, int64_t D) {
    const int64_t ld = round_up(D, kPairWidth) / 2;
    return {scratch.take(round_up(n, kWidth) * ld), ld};
}
// n rows of D numbers interleaved: n / 2 rows of D words.
inline Words take_interleaved(Scratch& scratch, int64_t n, int64_t D) {
    const int64_t ld = round_up(D, kPairWidth);
    return {scratch.take(pairs(round_up(n, kWidth)) * ld), ld};
}
// Rows of D numbers transposed: D / 2 rows of n words.
inline Words take_transposed(Scratch& scratch, int64_t n, int64_t D) {
    const int64_t ld = round_up(n, kWidth);
    return {scratch.take(round_up(D, kPairWidth) / 2 * ld), ld};
}

inline __m512i load_words(const float* p) { return _mm512_loadu_si512(p); }
inline void store_words(float* p, __m512i x) { _mm512_storeu_si512(p, x); }

// The first `left` of 32 numbers.
inline __mmask32 first_of_pairs(int64_t left) { return left >= kPairWidth ? 0xffffffffu : (1u << left) - 1; }
inline __m512i load_numbers(const uint16_t* p, int64_t left) {
    return left >= kPairWidth ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(first_of_pairs(left), p);
}

// function(d, the 32 numbers from d on) for all D of a token, zeros behind the last one.
template <class F>
inline void for_numbers(const uint16_t* p, int64_t D, F function) {
    int64_t d = 0;
    for (; d + kPairWidth <= D; d += kPairWidth) function(d, _mm512_loadu_si512(p + d));
    if (d < D) function(d, load_numbers(p + d, D - d));
}

// 32 numbers as two vectors of float, and back.
inline __m512 low_of(__m512i x) { return Vector::widen(_mm512_castsi512_si256(x)); }
inline __m512 high_of(__m512i x) { return Vector::widen(_mm512_extracti64x4_epi64(x, 1)); }
inline __m512i round_both(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Where a permutation finds the words (first + i, second + i).
inline __m512i pairing(int first, int second) {
    const __m512i i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_add_epi32(_mm512_or_si512(i, _mm512_slli_epi32(i, 16)), _mm512_set1_epi32(first | second << 16));
}
inline __m512i round_pair(__m512 first, __m512 second) {
    return _mm512_permutexvar_epi16(pairing(0, kWidth), round_both(first, second));
}

// dst[i, d] = the pair of src rows 2 i and 2 i + 1 at d; n rows, the last one beside zeros.
inline void interleave(const Words& dst, const Words& src, int64_t n) {
    const __m512i low = pairing(0, kPairWidth), high = pairing(kWidth, kPairWidth + kWidth);
    for (int64_t i = 0; i < pairs(n); i++) {
        for (int64_t d = 0; d < src.ld; d += kWidth) {
            const __m512i first = load_words(src.row(2 * i) + d), second = load_words(src.row(2 * i + 1) + d);
            store_words(dst.row(i) + 2 * d, _mm512_permutex2var_epi16(first, low, second));
            store_words(dst.row(i) + 2 * d + kWidth, _mm512_permutex2var_epi16(first, high, second));
        }
    }
}

// The same of floats in rows of ld, rounded; n rows, one more to be read when n is odd.
inline void interleave(const Words& dst, const float* src, int64_t ld, int64_t n) {
    for (int64_t i = 0; i < pairs(n); i++, src += 2 * ld)
        for (int64_t d = 0; d < ld; d += kWidth)
            store_words(dst.row(i) + d, round_pair(Vector::load(src + d), Vector::load(src + ld + d)));
}

// 16 columns from j on of row i of a lower triangle, zeros right of the diagonal.
inline __m512 load_lower(const float* row, int64_t i, int64_t j) {
    const int64_t left = i + 1 - j;
    return left <= 0 ? Vector::zero() : load_tail(row + j, int(smaller(left, kWidth)));
}

// A lower triangle, n rows of ld floats, interleaved and rounded.
inline void interleave_lower(const Words& dst, const float* src, int64_t ld, int64_t n) {
    for (int64_t i = 0; i < n; i += 2, src += 2 * ld) {
        for (int64_t j = 0; j < round_up(n, kWidth); j += kWidth) {
            const __m512 second = i + 1 < n ? load_lower(src + ld, i + 1, j) : Vector::zero();
            store_words(dst.row(i / 2) + j, round_pair(load_lower(src, i, j), second));
        }
    }
}

// The same as rows.
inline void round_lower(const Words& dst, const float* src, int64_t ld, int64_t n) {
    for (int64_t i = 0; i < n; i++, src += ld)
        for (int64_t j = 0; j < 2 * dst.ld; j += kPairWidth)
            store_words(dst.row(i) + j / 2, round_both(load_lower(src, i, j), load_lower(src, i, j + kWidth)));
}

// dst rows = src rows rounded; n rows of ld floats.
inline void round_rows(const Words& dst, const float* src, int64_t ld, int64_t n) {
    for (int64_t i = 0; i < n; i++, src += ld) {
        for (int64_t d = 0; d < ld; d += kPairWidth) {
            const __m512 high = d + kWidth < ld ? Vector::load(src + d + kWidth) : Vector::zero();
            store_words(dst.row(i) + d / 2, round_both(Vector::load(src + d), high));
        }
    }
}

inline void transpose_words(const Words& dst, const Words& src, int64_t n) {
    transpose_rows(dst.data, dst.ld, src.data, src.ld, n);
}

inline void clear_words_after(const Words& words, int64_t n) {
    clear(words.row(n), (round_up(n, kWidth) - n) * words.ld);
}

// n tokens of D numbers from t on.
struct Tokens {
    const Rows& rows;
    int64_t t, n, D;
    const uint8_t* mask;
    uint16_t* row(int64_t i) const { return static_cast<uint16_t*>(rows.data) + (t + i) * rows.stride; }
    bool is_hidden(int64_t i) const { return is_padding(mask, t + i); }
};

// Tokens as they are.
inline void copy_rows(const Words& dst, const Tokens& tokens) {
    for (int64_t i = 0; i < tokens.n; i++) {
        float* row = dst.row(i);
        if (tokens.is_hidden(i)) {
            clear(row, dst.ld);
        } else {
            for_numbers(tokens.row(i), tokens.D, [&](int64_t d, __m512i x) { store_words(row + d / 2, x); });
        }
    }
    clear_words_after(dst, tokens.n);
}

// The scale that makes tokens unit vectors of their weight; null weights are 1.
inline void find_unit_scale(const Tokens& tokens, const float* weight, UnitScale& scale) {
    float square[kMaxChunk];
    for (int64_t i = 0; i < tokens.n; i++) {
        __m512 sum = Vector::zero();
        if (!tokens.is_hidden(i)) {
            for_numbers(tokens.row(i), tokens.D, [&](int64_t, __m512i x) {
                sum = DotPairs::apply((__m512)x, (__m512)x, sum);
            });
        }
        square[i] = Vector::sum(sum);
    }
    scale.set(square, weight, tokens.n);
}

// 32 numbers times a factor. Those at even and at odd places are halves of a word, and go back to them.
inline __m512i scale_numbers(__m512i x, __m512 factor) {
    const __m512 even = (__m512)_mm512_slli_epi32(x, 16);
    const __m512 odd = (__m512)_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000)));
    return round_pair(Vector::mul(even, factor), Vector::mul(odd, factor));
}

// Tokens as unit vectors times their weight.
inline void load_unit_words(const Words& dst, const Tokens& tokens, const float* weight, UnitScale& scale) {
    find_unit_scale(tokens, weight, scale);
    for (int64_t i = 0; i < tokens.n; i++) {
        float* row = dst.row(i);
        const __m512 factor = Vector::set1(scale.factor[i]);
        if (tokens.is_hidden(i)) {
            clear(row, dst.ld);
        } else {
            for_numbers(tokens.row(i), tokens.D,
                        [&](int64_t d, __m512i x) { store_words(row + d / 2, scale_numbers(x, factor)); });
        }
    }
    clear_words_after(dst, tokens.n);
}

inline void store_numbers(uint16_t* p, __m512 low, __m512 high, int64_t left) {
    if (left >= kPairWidth) {
        _mm512_storeu_si512(p, round_both(low, high));
    } else {
        _mm512_mask_storeu_epi16(p, first_of_pairs(left), round_both(low, high));
    }
}

// As many of 16 floats as are left to p, or added to what is there.
inline void put_floats(float* p, __m512 x, int64_t left, bool adds) {
    if (left <= 0) return;
    const __mmask16 mask = left >= kWidth ? 0xffff : first(int(left));
    if (adds) x = Vector::add(x, _mm512_maskz_loadu_ps(mask, p));
    _mm512_mask_storeu_ps(p, mask, x);
}

// Tokens that are written; where two walks are added they are floats.
struct Results : Tokens {
    bool are_floats, adds;

    Results(const Tokens& tokens, bool are_floats, bool adds) : Tokens(tokens), are_floats(are_floats), adds(adds) {}

    // 32 numbers of token i, or as many as are left, from d on.
    inline void put(int64_t i, int64_t d, __m512 low, __m512 high) const {
        if (__builtin_expect(are_floats, false)) {
            put_floats(floats(i) + d, low, D - d, adds);
            put_floats(floats(i) + d + kWidth, high, D - d - kWidth, adds);
        } else {
            store_numbers(row(i) + d, low, high, D - d);
        }
    }
    void clear_token(int64_t i) const {
        if (are_floats) {
            clear(floats(i), D);
        } else {
            clear_elements(reinterpret_cast<BFloat16*>(row(i)), D);
        }
    }

  private:
    float* floats(int64_t i) const { return static_cast<float*>(rows.data) + (t + i) * rows.stride; }
};

// src rows, each times its factor (null: 1), to their tokens; padded tokens are zero.
inline void store_tokens(const Results& tokens, const Block& src, const float* factors = nullptr) {
    for (int64_t i = 0; i < tokens.n; i++) {
        if (tokens.is_hidden(i)) {
            tokens.clear_token(i);
            continue;
        }
        const __m512 factor = Vector::set1(factors == nullptr ? 1 : factors[i]);
        for (int64_t d = 0; d < tokens.D; d += kPairWidth) {
            const float* from = src.row(i) + d;
            const __m512 high = d + kWidth < src.ld ? Vector::load(from + kWidth) : Vector::zero();
            tokens.put(i, d, Vector::mul(Vector::load(from), factor), Vector::mul(high, factor));
        }
    }
}

// The inner product of a token with a row of floats, padded.
inline float dot(const uint16_t* token, const float* row, int64_t D) {
    __m512 low = Vector::zero(), high = Vector::zero();
    for (int64_t d = 0; d < D; d += kPairWidth) {
        const __m512i x = load_numbers(token + d, D - d);
        low = Vector::fma(low_of(x), Vector::load(row + d), low);
        if (d + kWidth < D) high = Vector::fma(high_of(x), Vector::load(row + d + kWidth), high);
    }
    return Vector::sum(Vector::add(low, high));
}

// The same with the token times a factor, rounded as `load_unit_words` rounds it.
inline float dot_rounded(const uint16_t* token, float factor, const float* row, int64_t D) {
    const __m512 f = Vector::set1(factor);
    __m512 low = Vector::zero(), high = Vector::zero();
    for (int64_t d = 0; d < D; d += kPairWidth) {
        const __m512i x = scale_numbers(load_numbers(token + d, D - d), f);
        low = Vector::fma(low_of(x), Vector::load(row + d), low);
        if (d + kWidth < D) high = Vector::fma(high_of(x), Vector::load(row + d + kWidth), high);
    }
    return Vector::sum(Vector::add(low, high));
}

// x . g of n tokens as x went into the products: of both passes of backward, so that what they have in common cancels.
inline void find_inner(const Tokens& source, const Block& gradient, const UnitScale& scale, float* inner) {
    for (int64_t i = 0; i < source.n && inner != nullptr; i++)
        inner[i] = source.is_hidden(i) ? 0 : dot_rounded(source.row(i), scale.factor[i], gradient.row(i), source.D);
}

// Rows times a power of two each, which is exact.
template <class F>
inline void scale_words(const Words& words, int64_t n, F factor_of) {
    for (int64_t i = 0; i < n; i++) {
        const __m512 factor = Vector::set1(factor_of(i));
        for (int64_t d = 0; d < words.ld; d += kWidth)
            store_words(words.row(i) + d, scale_numbers(load_words(words.row(i) + d), factor));
    }
}

// From the gradient of x = w x_hat that of the tokens that x came from, see rows.h; x is made from them once more.
inline void store_unit_gradient(const Results& tokens, const Tokens& source, const Block& gradient,
                                const UnitScale& scale) {
    for (int64_t i = 0; i < tokens.n; i++) {
        if (tokens.is_hidden(i)) {
            tokens.clear_token(i);
            continue;
        }
        const uint16_t* x = source.row(i);
        const float *g = gradient.row(i), f = scale.factor[i];
        const float along = scale.radial[i] == 0 ? 0 : f * dot(x, g, tokens.D) * -scale.radial[i] * f;
        const __m512 radial = Vector::set1(along), factor = Vector::set1(f);
        for (int64_t d = 0; d < tokens.D; d += kPairWidth) {
            const __m512i words = load_numbers(x + d, tokens.D - d);
            const __m512 low = Vector::fma(radial, low_of(words), Vector::load(g + d));
            const __m512 high = d + kWidth < tokens.D
                                    ? Vector::fma(radial, high_of(words), Vector::load(g + d + kWidth))
                                    : Vector::zero();
            tokens.put(i, d, Vector::mul(low, factor), Vector::mul(high, factor));
        }
    }
}

}  // namespace
