/* Mean over whole cells of what a mask lets through: g (n c h w), bits -> out (n c p q). */
#define WALK masked_patch_mean
#define LOAD(at, k) v8_keep(load8((const element *)walk->x + (at), k), bits8(walk->bits, at, k))
#define PUT(at, s, r) (((element *)walk->out)[at] = from_float((s) * (r)))
#define PUT8(at, s, r, k) store8((element *)walk->out + (at), v8_mul(s, v8_all(r)), k)
#include "cells.h"

void NAME(et_masked_patch_mean)(const element *g, const uint8_t *bits, element *out, int64_t n, int64_t c, int64_t h,
                                int64_t w, int64_t cell_h, int64_t cell_w, int channels_last, int threads) {
    cells walk = grid(n, c, h, w, cell_h, cell_w);
    walk.x = g;
    walk.bits = bits;
    walk.out = out;
    run_masked_patch_mean(&walk, channels_last, elements(&walk) * (int64_t)sizeof *g, threads);
}
