/* Convolutions with one bit a weight, and what packs bits, for float32. */
#include "sign_pack.c"
#include "binary_conv.c"
#include "bit_weight_conv.c"
#include "affine_clip.c"
