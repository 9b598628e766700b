// The plain C interface of the library: no torch, no Python, one struct of 64-bit words per call.
//
// Python packs a Call with `struct` in the order of these fields (cottention/ops/native/binding.py); a pointer is a
// word, 0 where there is none. Tensors are described by element strides; their last dimension has stride 1. Every
// function returns 0, or a Status.
//
//     Call call = {...}; int status = cottention_forward(&call);
#pragma once

#include <cstdint>

// Changes with the layout of Call, so that a library left over from another version is told apart.
#define COTTENTION_ABI_VERSION 1

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

enum Status : int { kOk = 0, kOutOfMemory = 1, kBadBoundaries = 2, kUnknownInstructionSet = 3 };

struct View {  // [B, T, H, D], or [B, H, D] with `token` unused
    int64_t data, batch, token, head;
};

struct Call {
    int64_t dtype;        // DType of q, k, v, o and their gradients; never kFloat64
    int64_t causal;       // bool
    int64_t num_threads;  // at most this many, the calling one included
    int64_t chunk;        // tokens per tile, 0: choose
    int64_t B, T, S, H, K, V;
    int64_t num_sequences;   // B, or the packed ones
    int64_t boundaries;      // int64 [num_sequences + 1], or 0: rows of a batch
    int64_t mask, mask_row;  // uint8 [B, S] and its row stride, or 0
    int64_t norm_const, norm_const_dtype, norm_const_stride;
    int64_t seen;        // int64 [N] before the first token, or 0
    int64_t kv;          // float [N, H, K, V] before the first token, or 0
    int64_t final_kv;    // float [N, H, K, V] to write, or 0; of all keys when not causal
    int64_t final_seen;  // int64 [N] to write, or 0
    View q, k, v, o;
    // backward alone
    View grad;           // of o
    int64_t dq, dk, dv;  // contiguous
    int64_t dm;          // float [H] to write, or 0
    int64_t grad_final;  // float [N, H, K, V], or 0
    int64_t dkv;         // float [N, H, K, V] to write, or 0
};

#if defined(__GNUC__)
#define COTTENTION_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define COTTENTION_EXPORT extern "C"
#endif

COTTENTION_EXPORT int cottention_abi_version();
// Name of the index-th instruction set that runs here, plainest first, null after the last; -1: of the active one.
COTTENTION_EXPORT const char* cottention_instruction_set(int64_t index);
// Make this one active, for tests and for whoever suspects a kernel; the widest is at first.
COTTENTION_EXPORT int cottention_use_instruction_set(const char* name);
// o, and final_kv and final_seen where asked for.
COTTENTION_EXPORT int cottention_forward(const Call* call);
// dq, dk, dv, and dm and dkv where asked for. When not causal, kv is the state over all keys that forward wrote.
COTTENTION_EXPORT int cottention_backward(const Call* call);
// One token (T = 1): o, final_kv and final_seen; final_kv may be kv itself.
COTTENTION_EXPORT int cottention_step(const Call* call);
