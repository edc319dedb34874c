/* All kernels for bfloat16: read and written as such, computed in float32. */
#define ET_BF16
#include "kernels.h"
