#include "kernels.h"

#include "vector_generic.h"

#include "sweeps.h"

#include "convolution.h"
#include "erase_backward.h"
#include "gated_step.h"

const Kernels kernels_generic = COTTENTION_KERNELS("generic");
