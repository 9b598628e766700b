// The forget gate of a token, as everything here reads it.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace {

// exp of less than this is zero even in float64; with it -inf is taken as any other strong decay.
constexpr double kStrongestDecay = 1000;

// log2 of what is kept at a token; 0 at padding.
inline double log2_kept(const Range& range, int64_t t) {
    // mirrored, a token forgets what the one before it here, which comes after it in time, says
    const int64_t i = range.mirrored ? t - 1 : t;
    if ((i < 0 && range.starts) || (range.key_mask != nullptr && range.key_mask[i] == 0)) return 0;
    const double x = range.log_decay.data[i * range.log_decay.stride];
    const double least = x < -kStrongestDecay ? -kStrongestDecay : x;  // NaN stays
    return 1.4426950408889634 * (least > kStrongestDecay ? kStrongestDecay : least);
}

}  // namespace
