/* How many elements of every cell have low < x < high: x (n c h w) -> out (n c p q). */
#include "counts.h"
#define WALK mask_count
#define LOAD(at, k) \
    v8_keep(v8_all(1), lanes_below(k) & v8_inside(load8((const element *)walk->x + (at), k), v8_all(walk->low), \
                                                  v8_all(walk->high)))
#define PUT(at, s, r) ((void)(r), put_count(walk->out, at, s, NARROW))
#define PUT8(at, s, r, k) ((void)(r), put_counts(walk->out, at, s, NARROW, k))
#include "cells.h"

void NAME(et_mask_count)(const element *x, void *out, float low, float high, int64_t n, int64_t c, int64_t h,
                         int64_t w, int64_t cell_h, int64_t cell_w, int channels_last, int threads) {
    cells walk = grid(n, c, h, w, cell_h, cell_w);
    walk.x = x;
    walk.out = out;
    walk.low = low;
    walk.high = high;
    run_mask_count(&walk, channels_last, elements(&walk) * (int64_t)sizeof *x, threads);
}
