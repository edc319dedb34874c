/* How many bits of every cell are set: bits of (n c h w) -> out (n c p q). */
#include "counts.h"
#define WALK bits_count
#define LOAD(at, k) v8_keep(v8_all(1), bits8(walk->bits, at, k))
#define PUT(at, s, r) ((void)(r), put_count(walk->out, at, s, NARROW))
#define PUT8(at, s, r, k) ((void)(r), put_counts(walk->out, at, s, NARROW, k))
#include "cells.h"

void NAME(et_bits_count)(const uint8_t *bits, void *out, int64_t n, int64_t c, int64_t h, int64_t w,
                         int64_t cell_h, int64_t cell_w, int channels_last, int threads) {
    cells walk = grid(n, c, h, w, cell_h, cell_w);
    walk.bits = bits;
    walk.out = out;
    run_bits_count(&walk, channels_last, elements(&walk), threads);
}
