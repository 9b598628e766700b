// Short depthwise convolution of the tokens of each row, with SiLU where asked for; included by each `kernels_*.cpp`.
//
//     z_s = sum_i w_i x_(s + i - before)          y_s = silu(z_s) = z_s sigmoid(z_s)          x is 0 outside the row
//     dz_s = dy_s silu'(z_s)                      dx_t = sum_i w_i dz_(t + before - i)        dw_i = sum_s dz_s x_(s + i - before)
//
// A task is one row's kChannels channels, which it walks kTokens at a time with all that it reads in the first-level
// cache. Plain loops over a constant number of channels: the compiler makes them vectors of each instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "abi.h"
#include "convert.h"

namespace {

struct Convolving {
    static constexpr int64_t kChannels = 64, kTokens = 64, kWidth = 64;
    typedef float Line[kChannels];  // a token's channels, zeros behind the last one

    // exp to 2 units in the last place from -80 to 80, beyond them its value there: 1 / exp stays a normal number, which
    // is computed at full speed. NaN stays NaN.
    static inline float exp_of(float x) {
        x = -80.0f > x ? -80.0f : x;
        x = 80.0f < x ? 80.0f : x;
        const float shifted = x * 1.44269504f + 12582912.0f;  // the nearest whole number stands in the last bits
        const float whole = shifted - 12582912.0f;
        const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
        float y = 1.9875691500e-4f;
        y = y * r + 1.3981999507e-3f;
        y = y * r + 8.3334519073e-3f;
        y = y * r + 4.1665795894e-2f;
        y = y * r + 1.6666665459e-1f;
        y = y * r + 5.0000001201e-1f;
        y = y * (r * r) + r + 1.0f;
        return y * float_of((bits_of(shifted) << 23) + 0x3f800000);
    }

    static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

    // Token t of a row, zeros where there is none.
    template <class E>
    static inline void load(const E* row, int64_t token_stride, int64_t t, int64_t num_tokens, int64_t channels,
                            Line& line) {
        if (t < 0 || t >= num_tokens) {
            for (float& x : line) x = 0;
            return;
        }
        const E* x = row + t * token_stride;
        if (channels == kChannels) {
            for (int64_t c = 0; c < kChannels; c++) line[c] = widen(x[c]);
        } else {
            for (int64_t c = 0; c < kChannels; c++) line[c] = c < channels ? widen(x[c]) : 0;
        }
    }

    template <class E>
    static inline void store(const Line& line, int64_t channels, E* y) {
        if (channels == kChannels) {
            for (int64_t c = 0; c < kChannels; c++) narrow(line[c], y + c);
        } else {
            for (int64_t c = 0; c < channels; c++) narrow(line[c], y + c);
        }
    }

    // out = sum_i weight_i lines_i, in the order of the taps.
    static inline void sum_of_taps(const Line* weight, const Line* lines, int64_t width, Line& out) {
        float sum[kChannels];
        for (int64_t c = 0; c < kChannels; c++) sum[c] = weight[0][c] * lines[0][c];
        for (int64_t i = 1; i < width; i++)
            for (int64_t c = 0; c < kChannels; c++) sum[c] += weight[i][c] * lines[i][c];
        for (int64_t c = 0; c < kChannels; c++) out[c] = sum[c];
    }

    // One task's part of the call.
    template <class E>
    struct Part {
        const Convolution& call;
        int64_t row, first, channels;  // of the task
        Line weight[kWidth];

        Part(const Convolution& given, int64_t task) : call(given) {
            const int64_t blocks = (call.C + kChannels - 1) / kChannels;
            row = task / blocks;
            first = task % blocks * kChannels;
            channels = std::min(kChannels, call.C - first);
            const float* w = pointer<const float>(call.weight) + first * call.W;
            for (int64_t i = 0; i < call.W; i++)
                for (int64_t c = 0; c < kChannels; c++) weight[i][c] = c < channels ? w[c * call.W + i] : 0;
        }

        const E* x() const { return pointer<const E>(call.x) + row * call.x_row + first; }
        const E* dy() const { return pointer<const E>(call.dy) + row * call.dy_row + first; }
        E* y(int64_t s) const { return pointer<E>(call.y) + (row * call.S + s) * call.C + first; }
        E* dx(int64_t t) const { return pointer<E>(call.dx) + (row * call.T + t) * call.C + first; }
    };

    template <class E>
    static void forward_of(const Convolution& call, int64_t task) {
        const Part<E> part(call, task);
        const int64_t W = call.W;
        Line x[kTokens + kWidth - 1], z;
        for (int64_t i = 0; i < W - 1; i++) load(part.x(), call.x_token, i - call.before, call.T, part.channels, x[i]);
        for (int64_t start = 0; start < call.S; start += kTokens) {
            const int64_t n = std::min(kTokens, call.S - start);
            for (int64_t s = 0; s < n; s++) {
                load(part.x(), call.x_token, start + s + W - 1 - call.before, call.T, part.channels, x[s + W - 1]);
                sum_of_taps(part.weight, x + s, W, z);
                if (call.activates)
                    for (int64_t c = 0; c < kChannels; c++) z[c] *= sigmoid(z[c]);
                store(z, part.channels, part.y(start + s));
            }
            for (int64_t i = 0; i < W - 1; i++) std::copy_n(x[n + i], kChannels, x[i]);
        }
    }

    // dz of kTokens outputs, behind the last W - 1 of the kTokens before; what dx and dw need of them follows.
    template <class E>
    static void backward_of(const Convolution& call, int64_t task) {
        const Part<E> part(call, task);
        const int64_t W = call.W;
        Line x[kTokens + kWidth - 1], dz[kTokens + kWidth - 1], reversed[kWidth], dw[kWidth], out;
        for (int64_t i = 0; i < W; i++) std::copy_n(part.weight[W - 1 - i], kChannels, reversed[i]);
        for (int64_t i = 0; i < W; i++) std::fill_n(dw[i], kChannels, 0.0f);
        for (int64_t i = 0; i < W - 1; i++) {
            load(part.x(), call.x_token, i - call.before, call.T, part.channels, x[i]);
            std::fill_n(dz[i], kChannels, 0.0f);
        }
        for (int64_t start = 0; start < std::max(call.S, call.T + call.before); start += kTokens) {
            for (int64_t s = 0; s < kTokens; s++) {
                Line& d = dz[s + W - 1];
                load(part.x(), call.x_token, start + s + W - 1 - call.before, call.T, part.channels, x[s + W - 1]);
                load(part.dy(), call.dy_token, start + s, call.S, part.channels, d);
                if (start + s >= call.S) continue;  // no output reads there, whatever stands there
                if (call.activates) {
                    sum_of_taps(part.weight, x + s, W, out);
                    for (int64_t c = 0; c < kChannels; c++) {
                        const float gate = sigmoid(out[c]);
                        d[c] *= gate * (1.0f + out[c] * (1.0f - gate));
                    }
                }
            }
            const int64_t n = std::min(kTokens, call.S - start);  // outputs here, perhaps none
            for (int64_t i = 0; call.dweight && i < W; i++) {
                float sum[kChannels] = {};
                for (int64_t s = 0; s < n; s++)
                    for (int64_t c = 0; c < kChannels; c++) sum[c] += dz[s + W - 1][c] * x[s + i][c];
                for (int64_t c = 0; c < kChannels; c++) dw[i][c] += sum[c];
            }
            for (int64_t s = 0; call.dx && s < kTokens; s++) {
                const int64_t t = start + s - call.before;
                if (t < 0 || t >= call.T) continue;
                sum_of_taps(reversed, dz + s, W, out);
                store(out, part.channels, part.dx(t));
            }
            for (int64_t i = 0; i < W - 1; i++) {
                std::copy_n(x[kTokens + i], kChannels, x[i]);
                std::copy_n(dz[kTokens + i], kChannels, dz[i]);
            }
        }
        if (!call.dweight) return;
        float* found = pointer<float>(call.dweight) + (part.row * call.C + part.first) * W;
        for (int64_t c = 0; c < part.channels; c++)
            for (int64_t i = 0; i < W; i++) found[c * W + i] = dw[i][c];
    }

    template <class E>
    static inline E* pointer(int64_t address) {
        return reinterpret_cast<E*>(address);
    }
};

void convolution(const Convolution& call, int64_t task) {
    if (call.dtype == kFloat32) return Convolving::forward_of<float>(call, task);
    if (call.dtype == kBFloat16) return Convolving::forward_of<BFloat16>(call, task);
    Convolving::forward_of<Float16>(call, task);
}

void convolution_backward(const Convolution& call, int64_t task) {
    if (call.dtype == kFloat32) return Convolving::backward_of<float>(call, task);
    if (call.dtype == kBFloat16) return Convolving::backward_of<BFloat16>(call, task);
    Convolving::backward_of<Float16>(call, task);
}

}  // namespace
