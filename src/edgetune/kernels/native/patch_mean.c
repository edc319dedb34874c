/* Mean of every cell: x (n c h w) -> out (n c p q), or in memory (c n p q) with by_channel, summed in float32. */
#define WALK patch_mean
#define LOAD(at, k) load8((const element *)walk->x + (at), k)
#define PUT(at, s, r) (((element *)walk->out)[at] = from_float((s) * (r)))
#define PUT8(at, s, r, k) store8((element *)walk->out + (at), v8_mul(s, v8_all(r)), k)
#include "cells.h"

void NAME(et_patch_mean)(const element *x, element *out, int64_t n, int64_t c, int64_t h, int64_t w,
                         int64_t cell_h, int64_t cell_w, int channels_last, int by_channel, int threads) {
    cells walk = grid(n, c, h, w, cell_h, cell_w);
    walk.x = x;
    walk.out = out;
    if (by_channel) lay_by_channel(&walk);
    run_patch_mean(&walk, channels_last, elements(&walk) * (int64_t)sizeof *x, threads);
}
