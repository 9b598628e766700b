// Which instruction set's kernels run.
#pragma once

#include "kernels.h"

// The widest that this CPU runs, unless another one was asked for.
const Kernels& active_kernels();
