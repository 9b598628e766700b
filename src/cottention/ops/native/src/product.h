// Products of small matrices in registers: a tile of the result stays there while one or two products run over it.
//
//     c[i, n] (+)= sum_k a[i, k] b[k, n]      a at any strides, b and c with unit stride along n
//
// A sum over many products loses its last bits at each of them: 5e-5 of it after a million tokens. So what is added to
// comes with what rounding took from it, `lost`, which the next product starts from (W. Kahan, "Further remarks on
// reducing truncation errors", 1965). Eight bits of that are enough, and keep the memory that it needs small.
//
// The vectors run along n. A tile has `rows` x `vectors` accumulators, as many as the registers hold beside one row
// of b and the broadcast of a. All right-hand sides are scratch whose rows are padded to whole vectors.
#pragma once

#include <cstdint>

#include "ahead.h"

namespace {

struct Product {
    const float* a;
    int64_t row, step;  // strides of a along i and k
    const float* b;
    int64_t ld;  // rows of b
    int64_t depth;
};

constexpr int kWidth = Vector::kWidth;
constexpr int kMaxVectors = Vector::kRegisters == 32 ? 4 : 2;

constexpr int max_rows(int vectors) {
    return Vector::kRegisters == 32 ? (vectors == 1   ? 14
                                       : vectors == 2 ? 12
                                       : vectors == 3 ? 8
                                                      : 6)
                                    : (vectors == 1 ? 12 : 6);
}

// Beside the diagonal of a lower triangle, zeros as far as the highest tile reaches.
constexpr int kDiagonal = max_rows(1);

// How a number of a and a vector of b meet. Another arithmetic may take the 32-bit words for something else.
struct MultiplyAdd {
    static inline Vector::F apply(Vector::F a, Vector::F b, Vector::F c) { return Vector::fma(a, b, c); }
};

inline Vector::F load_lost(const uint16_t* p) { return Vector::load(reinterpret_cast<const BFloat16*>(p)); }

// c = the products or, where there is `lost`, c + lost += the products.
template <class Arithmetic, int kRows, int kVectors>
void tile(const Product* products, int num_products, float* c, uint16_t* lost, int64_t ld) {
    Vector::F sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++)
            sums[i][j] = lost == nullptr ? Vector::zero() : load_lost(lost + i * ld + j * kWidth);
    for (int p = 0; p < num_products; p++) {
        const float *a = products[p].a, *b = products[p].b;
        const int64_t row = products[p].row, step = products[p].step, ld_b = products[p].ld;
        for (int64_t k = products[p].depth; k > 0; k--) {
            Vector::F right[kVectors];
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; j++) right[j] = Vector::load(b + j * kWidth);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; i++) {
                const Vector::F left = Vector::set1(a[i * row]);
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; j++) sums[i][j] = Arithmetic::apply(left, right[j], sums[i][j]);
            }
            a += step;
            b += ld_b;
        }
    }
    if (lost == nullptr) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; j++) Vector::store(c + i * ld + j * kWidth, sums[i][j]);
        return;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++, c += ld, lost += ld) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) {
            const Vector::F before = Vector::load(c + j * kWidth), after = Vector::add(before, sums[i][j]);
            Vector::store(c + j * kWidth, after);
            sums[i][j] = Vector::sub(sums[i][j], Vector::sub(after, before));
        }
#pragma GCC unroll 2
        for (int j = 0; j + 1 < kVectors; j += 2) Vector::store_lost(lost + j * kWidth, sums[i][j], sums[i][j + 1]);
        if (kVectors % 2 == 1)
            Vector::store_lost(lost + (kVectors - 1) * kWidth, sums[i][kVectors - 1]);
    }
}

typedef void (*Tile)(const Product*, int, float*, uint16_t*, int64_t);

template <int... kIs>
struct Sequence {};
template <int kN, int... kIs>
struct MakeSequence : MakeSequence<kN - 1, kN, kIs...> {};
template <int... kIs>
struct MakeSequence<0, kIs...> {
    typedef Sequence<kIs...> type;
};

template <class Arithmetic, int kVectors, int... kRows>
inline Tile pick(int rows, Sequence<kRows...>) {
    static constexpr Tile kTiles[] = {tile<Arithmetic, kRows, kVectors>...};
    return kTiles[rows - 1];
}

template <class Arithmetic>
inline Tile pick_tile(int rows, int vectors) {
    if (vectors == 1) return pick<Arithmetic, 1>(rows, MakeSequence<max_rows(1)>::type());
    if (vectors == 2) return pick<Arithmetic, 2>(rows, MakeSequence<max_rows(2)>::type());
    if constexpr (kMaxVectors == 4) {
        if (vectors == 3) return pick<Arithmetic, 3>(rows, MakeSequence<max_rows(3)>::type());
        return pick<Arithmetic, 4>(rows, MakeSequence<max_rows(4)>::type());
    }
    return nullptr;
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows are cut into blocks of nearly equal height, so that no thin tile is left over at the end.
struct Blocks {
    int64_t total, count;
    Blocks(int64_t total, int64_t height) : total(total), count((total + height - 1) / height) {}
    int64_t start(int64_t i) const { return total * i / count; }
};

// c and lost [rows, vectors] times a power of two, just before more is added to them.
inline void scale_tile(int64_t rows, int64_t vectors, float* c, uint16_t* lost, int64_t ld, float factor) {
    const Vector::F f = Vector::set1(factor);
    for (int64_t i = 0; i < rows; i++, c += ld, lost += ld) {
        for (int64_t d = 0; d < vectors * kWidth; d += kWidth) {
            Vector::store(c + d, Vector::mul(Vector::load(c + d), f));
            Vector::store_lost(lost + d, Vector::mul(load_lost(lost + d), f));
        }
    }
}

// c [rows, columns] = the products, or c + lost = kept (c + lost) + these where there is `lost`; `columns` in whole
// vectors, kept a power of two.
// `narrow(i0, i1, product index, Product&)` may shorten a product for the rows i0 .. i1: so triangles are skipped.
template <class Arithmetic = MultiplyAdd, class Narrow>
void multiply(int64_t rows, int64_t columns, const Product* products, int num_products, float* c, uint16_t* lost,
              int64_t ld, Ahead& ahead, Narrow narrow, float kept = 1) {
    for (int64_t n = 0; n < columns;) {
        const int vectors = int(smaller((columns - n) / kWidth, kMaxVectors));
        const Blocks blocks(rows, max_rows(vectors));
        for (int64_t block = 0; block < blocks.count; block++) {
            const int64_t i0 = blocks.start(block), i1 = blocks.start(block + 1);
            Product moved[2];
            for (int p = 0; p < num_products; p++) {
                moved[p] = products[p];
                moved[p].a += i0 * moved[p].row;
                moved[p].b += n;
                narrow(i0, i1, p, moved[p]);
            }
            ahead.some();
            const int64_t at = i0 * ld + n;
            uint16_t* lost_there = lost == nullptr ? nullptr : lost + at;
            if (kept != 1) scale_tile(i1 - i0, vectors, c + at, lost_there, ld, kept);
            pick_tile<Arithmetic>(int(i1 - i0), vectors)(moved, num_products, c + at, lost_there, ld);
        }
        n += vectors * kWidth;
    }
}

template <class Arithmetic = MultiplyAdd>
inline void multiply(int64_t rows, int64_t columns, const Product& product, float* c, uint16_t* lost, int64_t ld,
                     Ahead& ahead, float kept = 1) {
    multiply<Arithmetic>(rows, columns, &product, 1, c, lost, ld, ahead, [](int64_t, int64_t, int, Product&) {}, kept);
}

// c [n, n] = tril(a b), b [depth, n]: whole vectors right of the diagonal are skipped, the rest beside it zeroed.
template <class Arithmetic = MultiplyAdd>
inline void multiply_lower(int64_t n, const Product& product, float* c, int64_t ld, Ahead& ahead) {
    const int64_t height = n <= 2 * kWidth ? max_rows(2) : max_rows(kMaxVectors);
    const Blocks blocks(n, height);
    for (int64_t block = 0; block < blocks.count; block++) {
        const int64_t i0 = blocks.start(block), i1 = blocks.start(block + 1);
        const int64_t all = round_up(i1, kWidth) / kWidth;
        for (int64_t j = 0; j < all;) {
            int vectors = int(smaller(all - j, kMaxVectors));
            while (max_rows(vectors) < i1 - i0) vectors--;
            Product moved = product;
            moved.a += i0 * moved.row;
            moved.b += j * kWidth;
            ahead.some();
            pick_tile<Arithmetic>(int(i1 - i0), vectors)(&moved, 1, c + i0 * ld + j * kWidth, nullptr, ld);
            j += vectors;
        }
        for (int64_t i = i0; i < i1; i++)
            for (int64_t j = i + 1; j < smaller(i + kDiagonal, ld); j += kWidth) {
                if (j + kWidth <= ld) {
                    Vector::store(c + i * ld + j, Vector::zero());
                } else {
                    store_tail(c + i * ld + j, Vector::zero(), int(ld - j));
                }
            }
    }
}

// The two uses of tril(scores) below: rows i of the matrix meet columns up to i, columns j meet rows from j on.
// Tiles are up to kDiagonal high, so that much right of the diagonal is zero.
inline void narrow_lower(int64_t, int64_t i1, Product& product) { product.depth = smaller(product.depth, i1); }
inline void narrow_upper(int64_t i0, int64_t, Product& product) {
    product.a += i0 * product.step;
    product.b += i0 * product.ld;
    product.depth -= i0;
}

}  // namespace
