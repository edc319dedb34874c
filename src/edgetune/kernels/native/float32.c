/* All kernels for float32. */
#include "kernels.h"
#include "max_pool_backward.c"
#include "grid_products.c"
#include "group_unpack.c"
