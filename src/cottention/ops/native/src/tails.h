// The last, incomplete vector of a row, for instruction sets without masked loads.
#pragma once

namespace {

template <class E>
inline Vector::F load_tail(const E* p, int n) {
    E padded[Vector::kWidth] = {};
    for (int i = 0; i < n; i++) padded[i] = p[i];
    return Vector::load(padded);
}

template <class E>
inline void store_tail(E* p, Vector::F x, int n) {
    E padded[Vector::kWidth];
    Vector::store(padded, x);
    for (int i = 0; i < n; i++) p[i] = padded[i];
}

}  // namespace
