#include "kernels.h"

#include "vector_avx512.h"

#include "sweeps_bf16.h"

#include "convolution.h"
#include "erase_backward_bf16.h"

const Kernels kernels_avx512bf16 = COTTENTION_KERNELS("avx512bf16");
