#include "kernels.h"

#include "vector_generic.h"

#include "sweeps.h"

const Kernels kernels_generic = COTTENTION_KERNELS("generic");
