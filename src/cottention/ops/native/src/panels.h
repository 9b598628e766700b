// Products onto what is there already, and unit-triangular systems, in the registers that product.h has its tiles in.
//
//     c = factor start + sum of products
//     x_i = start_i + (product)_i + sum_{j<i} minus_ij u_j      u_j = beta_j x_j      minus: the triangle's negative
//
// A system is solved a panel of rows at a time: the rows above come in as one more product, and what is left is a
// triangle of a few rows whose tile stays in the registers.
#pragma once

#include "product.h"

namespace {

constexpr int kMostProducts = 4;
constexpr Product kNothing = {nullptr, 0, 0, nullptr, 0, 0};

// The left side of the only product is a lower triangle.
inline const auto keep_lower_rows = [](int64_t, int64_t i1, int, Product& product) { narrow_lower(0, i1, product); };

template <class Arithmetic, int kRows, int kVectors>
inline const float* add_products(Vector::F (&sums)[kRows][kVectors], const Product* products, int num_products) {
    const float* a = nullptr;
    for (int p = 0; p < num_products; p++) {
        a = products[p].a;
        const float* b = products[p].b;
        const int64_t row = products[p].row, step = products[p].step, ld = products[p].ld;
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
            b += ld;
        }
    }
    return a;  // behind the last product's depth
}

// c = factor start + the products.
struct Onto {
    const float* start;
    float factor;
    float* c;
    int64_t ld;

    template <class Arithmetic, int kRows, int kVectors>
    static void panel(const Product* products, int num_products, const Onto& to) {
        Vector::F sums[kRows][kVectors];
        const Vector::F factor = Vector::set1(to.factor);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; j++)
                sums[i][j] = Vector::mul(factor, Vector::load(to.start + i * to.ld + j * kWidth));
        add_products<Arithmetic>(sums, products, num_products);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; j++) Vector::store(to.c + i * to.ld + j * kWidth, sums[i][j]);
    }
};

// The last product is that of the rows above. Rows are ld apart, less than 0 where the last one comes first.
struct System {
    const float *start, *beta;
    float *x, *u;  // x: or null
    int64_t ld, beta_step;

    template <class Arithmetic, int kRows, int kVectors>
    static void panel(const Product* products, int num_products, const System& to) {
        Vector::F sums[kRows][kVectors];
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; j++) sums[i][j] = Vector::load(to.start + i * to.ld + j * kWidth);
        const int64_t row = products[num_products - 1].row, step = products[num_products - 1].step;
        const float* minus = add_products<Arithmetic>(sums, products, num_products);
#pragma GCC unroll 16
        for (int k = 0; k < kRows; k++) {
            const Vector::F beta = Vector::set1(to.beta[k * to.beta_step]);
            Vector::F u[kVectors];
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; j++) {
                u[j] = Vector::mul(beta, sums[k][j]);
                Vector::store(to.u + k * to.ld + j * kWidth, u[j]);
                if (to.x != nullptr) Vector::store(to.x + k * to.ld + j * kWidth, sums[k][j]);
            }
#pragma GCC unroll 16
            for (int i = k + 1; i < kRows; i++) {
                const Vector::F left = Vector::set1(minus[i * row + k * step]);
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; j++) sums[i][j] = Arithmetic::apply(left, u[j], sums[i][j]);
            }
        }
    }
};

template <class To, class Arithmetic, int kVectors, int... kRows>
inline void run_panel(int rows, const Product* products, int num_products, const To& to, Sequence<kRows...>) {
    static constexpr void (*kPanels[])(const Product*, int, const To&) = {
        To::template panel<Arithmetic, kRows, kVectors>...};
    kPanels[rows - 1](products, num_products, to);
}

template <class Arithmetic, class To>
inline void run_panel(int rows, int vectors, const Product* products, int num_products, const To& to) {
    if (vectors == 1) {
        run_panel<To, Arithmetic, 1>(rows, products, num_products, to, MakeSequence<max_rows(1)>::type());
    } else if (vectors == 2) {
        run_panel<To, Arithmetic, 2>(rows, products, num_products, to, MakeSequence<max_rows(2)>::type());
    } else if constexpr (kMaxVectors == 4) {
        if (vectors == 3) {
            run_panel<To, Arithmetic, 3>(rows, products, num_products, to, MakeSequence<max_rows(3)>::type());
        } else {
            run_panel<To, Arithmetic, 4>(rows, products, num_products, to, MakeSequence<max_rows(4)>::type());
        }
    }
}

// function(i0, i1, n, vectors) for each panel of rows and vectors of columns; rows in their order.
template <class F>
inline void for_panels(int64_t rows, int64_t columns, F function) {
    for (int64_t n = 0; n < columns;) {
        const int vectors = int(smaller((columns - n) / kWidth, kMaxVectors));
        const Blocks blocks(rows, max_rows(vectors));
        for (int64_t i = 0; i < blocks.count; i++) function(blocks.start(i), blocks.start(i + 1), n, vectors);
        n += vectors * kWidth;
    }
}

// c [rows, columns] = factor start + the products, narrowed as `multiply` does. start may be c.
template <class Arithmetic = MultiplyAdd, class Narrow>
void multiply_onto(int64_t rows, int64_t columns, const Product* products, int num_products, const Onto& to,
                   Ahead& ahead, Narrow narrow) {
    for_panels(rows, columns, [&](int64_t i0, int64_t i1, int64_t n, int vectors) {
        Product moved[kMostProducts];
        for (int p = 0; p < num_products; p++) {
            moved[p] = products[p];
            moved[p].a += i0 * moved[p].row;
            moved[p].b += n;
            narrow(i0, i1, p, moved[p]);
        }
        ahead.some();
        const int64_t at = i0 * to.ld + n;
        run_panel<Arithmetic>(int(i1 - i0), vectors, moved, num_products,
                              Onto{to.start + at, to.factor, to.c + at, to.ld});
    });
}

// Solves for x and u [n, columns]. `known`: a product that starts with start; `minus`: its rows and steps alone count.
template <class Arithmetic = MultiplyAdd>
void solve(int64_t n, int64_t columns, const Product& known, const Product& minus, const System& to, Ahead& ahead) {
    for_panels(n, columns, [&](int64_t i0, int64_t i1, int64_t column, int vectors) {
        Product moved[] = {known, minus};
        moved[0].a += i0 * known.row;
        moved[0].b += column;
        moved[1].a += i0 * minus.row;
        moved[1].b = to.u + column;
        moved[1].ld = to.ld;
        moved[1].depth = i0;
        ahead.some();
        const int64_t at = i0 * to.ld + column;
        run_panel<Arithmetic>(int(i1 - i0), vectors, moved, 2,
                              System{to.start + at, to.beta + i0 * to.beta_step, to.x == nullptr ? nullptr : to.x + at,
                                     to.u + at, to.ld, to.beta_step});
    });
}

// The same for the transpose of the triangle: from the last row on.
template <class Arithmetic = MultiplyAdd>
void solve_transposed(int64_t n, int64_t columns, const float* minus, int64_t ld_minus, const System& to,
                      Ahead& ahead) {
    const int64_t last = (n - 1) * to.ld;
    const Product turned = {minus + (n - 1) * ld_minus + n - 1, -1, -ld_minus, nullptr, 0, 0};
    solve<Arithmetic>(n, columns, kNothing, turned,
                      {to.start + last, to.beta + n - 1, to.x == nullptr ? nullptr : to.x + last, to.u + last, -to.ld,
                       -1},
                      ahead);
}

}  // namespace
