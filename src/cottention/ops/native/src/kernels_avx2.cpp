#include "kernels.h"

#include "vector_avx2.h"

#include "sweeps.h"

#include "convolution.h"
#include "erase_backward.h"
#include "gated_step.h"

const Kernels kernels_avx2 = COTTENTION_KERNELS("avx2");
