/* Every kernel, for the element type that the including file chose. */
#include "patch_mean.c"
#include "masked_patch_mean.c"
#include "mask_count.c"
#include "bits_count.c"
#include "patch_spread.c"
#include "mask_pack.c"
#include "mask_apply.c"
#include "max_pool.c"
