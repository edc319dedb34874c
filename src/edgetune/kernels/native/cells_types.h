/* What a walk over cells is given, and how its functions are named. */
#ifndef EDGETUNE_CELLS_TYPES_H
#define EDGETUNE_CELLS_TYPES_H
#include "simd.h"
#include "threads.h"

typedef struct {
    const void *x;
    const uint8_t *bits;
    void *out;
    int64_t n, c, h, w, cell_h, cell_w, p, q;
    int64_t to_sample, to_channel;  /* on the grid: from one sample to the next, from one channel to the next */
    float low, high;
} cells;
enum { TILE = 512, TILE_CELLS = 16, TILE_CHANNELS = 128 };
enum { LINE = 64 / (int)sizeof(element), FETCH_LINES = 64 };
#define AHEAD static inline __attribute__((always_inline))
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define FN(name) JOIN(name, WALK)
#define walkname JOIN(walk, name)  /* run_patch_mean is run_patch_mean_f32 */

static inline int64_t elements(const cells *walk) { return walk->n * walk->c * walk->h * walk->w; }
static inline cells grid(int64_t n, int64_t c, int64_t h, int64_t w, int64_t cell_h, int64_t cell_w) {
    int64_t p = (h + cell_h - 1) / cell_h, q = (w + cell_w - 1) / cell_w;
    return (cells){.n = n, .c = c, .h = h, .w = w, .cell_h = cell_h, .cell_w = cell_w, .p = p, .q = q,
                   .to_sample = c * p * q, .to_channel = p * q};
}

/* The grid lies (c n p q) instead. */
static inline void lay_by_channel(cells *walk) {
    walk->to_sample = walk->p * walk->q;
    walk->to_channel = walk->n * walk->to_sample;
}

/* Where a row of cells begins on the grid. */
static inline int64_t cell_row(const cells *walk, int64_t sample, int64_t channel, int64_t p) {
    return sample * walk->to_sample + channel * walk->to_channel + p * walk->q;
}
#endif
