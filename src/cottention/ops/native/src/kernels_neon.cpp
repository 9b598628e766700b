#include "kernels.h"

#include "vector_neon.h"

#include "sweeps.h"

#include "convolution.h"
#include "erase_backward.h"
#include "gated_step.h"

const Kernels kernels_neon = COTTENTION_KERNELS("neon");
