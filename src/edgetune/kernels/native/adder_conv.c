/* The adder convolution: y[o, l] = - sum over taps and channels of |x - w|, padding being 0.
 *
 * A few pixels meet 16 filters (or the last 8) at a time: sums in registers, lanes are filters, each value of x is
 * spread over all lanes. Filters are laid out once a call: (group, block of 8, tap, channel, 8). */
#include "adder.h"

enum { PIXELS = 4 };

typedef struct {
    const layer *l;
    const float *x, *filters;
    float *y;
    int64_t blocks;  /* of 8 filters, in a group; a strip has two */
    cuts cuts;
    runs runs;
    int last;        /* whether y lies channels last */
} sums;

/* PIXELS windows of x and `blocks` blocks of filters: acc -= |x - w| over all taps and channels. */
static inline __attribute__((always_inline)) void meet_filters(v8 acc[PIXELS * 2], const float *const x[PIXELS], runs r,
                                                               const float *w, int64_t next, int blocks) {
    for (int64_t u = 0; u < r.rows; u++)
        for (int64_t v = 0; v < r.columns; v++) {
            int64_t at = u * r.row_step + v * r.column_step;
            const float *from[PIXELS];
            for (int i = 0; i < PIXELS; i++) from[i] = x[i] + at;
            for (int64_t k = 0; k < r.length; k++, w += LANES) {
                v8 filters[2] = {v8_load(w), v8_load(blocks == 2 ? w + next : w)};
                for (int i = 0; i < PIXELS; i++) {
                    v8 value = v8_all(from[i][k]);
                    for (int j = 0; j < blocks; j++)
                        acc[i * 2 + j] = v8_less_distance(acc[i * 2 + j], value, filters[j]);
                }
            }
        }
}

/* Eight filters' sums, from `filter` on, of `count` pixels: pixel k's are every second one, acc[2 k]. Where y isn't
 * channels last, a filter's pixels are written together, as filters may lie so far apart that they share cache sets. */
static inline void put_sums(const sums *s, int64_t pixel, int64_t count, int64_t filter, const v8 *acc, int64_t lanes) {
    const layer *l = s->l;
    if (s->last) {
        for (int64_t k = 0; k < count; k++) store8(s->y + (pixel + k) * l->o + filter, acc[2 * k], (int)lanes);
        return;
    }
    float turned[PIXELS][LANES];
    int64_t map = l->p * l->q, at[PIXELS];
    for (int64_t k = 0; k < count; k++) {
        v8_store(turned[k], acc[2 * k]);
        at[k] = (pixel + k) / map * l->o * map + (pixel + k) % map;
    }
    for (int64_t f = 0; f < lanes; f++)
        for (int64_t k = 0; k < count; k++) s->y[at[k] + (filter + f) * map] = turned[k][f];
}

/* One strip of filters meets one tile of pixels. */
static inline __attribute__((always_inline)) void add_tile(const void *job, int64_t group, int64_t strip, int64_t pixel,
                                                           int64_t count, const int64_t *windows) {
    const sums *s = job;
    const layer *l = s->l;
    int64_t i = l->c / l->groups, filters = l->o / l->groups, next = taps_of(l) * i * LANES;
    const float *x[PIXELS], *w = s->filters + (group * s->blocks + strip * 2) * next;
    for (int k = 0; k < PIXELS; k++) x[k] = s->x + windows[k];
    v8 acc[PIXELS * 2];
    for (int k = 0; k < PIXELS * 2; k++) acc[k] = v8_all(0);
    int two = strip * 2 + 1 < s->blocks;
    if (two) meet_filters(acc, x, s->runs, w, next, 2);
    else meet_filters(acc, x, s->runs, w, next, 1);
    for (int j = 0; j <= two; j++) {
        int64_t first = (strip * 2 + j) * LANES;
        put_sums(s, pixel, count, group * filters + first, acc + j, least(LANES, filters - first));
    }
}

/* Items are (group, strip of filters, tile of pixels). */
static void add_differences(const void *job, int64_t begin, int64_t end) {
    const sums *s = job;
    each_tile(s->l, &s->cuts, s->l->c, PIXELS, begin, end, job, add_tile);
}

/* One channel a group: both sides have the channels in their lanes. Items are output pixels. */
static void add_channelwise(const void *job, int64_t begin, int64_t end) {
    const sums *s = job;
    const layer *l = s->l;
    const runs *r = &s->runs;
    place here = place_of(l, begin, l->c);
    for (int64_t pixel = begin; pixel < end; pixel++, step(l, &here, l->c))
        for (int64_t c = 0; c < l->c; c += LANES) {
            const float *w = s->filters + c * taps_of(l), *x = s->x + here.at + c;
            int count = (int)least(LANES, l->c - c);
            v8 acc = v8_all(0);
            for (int64_t u = 0; u < r->rows; u++)
                for (int64_t v = 0; v < r->columns; v++, w += LANES)
                    acc = v8_less_distance(acc, load8(x + u * r->row_step + v * r->column_step, count), v8_load(w));
            put_sums(s, pixel, 1, c, &acc, count);
        }
}

/* None of the sizes is 0. sizes: those of `layer`, then steps of w in elements (filter, channel, tap) and whether y
 * lies channels last. scratch: the filters laid out, each block of 8 whole, then the framed map. */
void et_adder_conv_f32(const float *x, const float *w, float *y, float *scratch, const int64_t *sizes, int threads) {
    layer l;
    memcpy(&l, sizes, sizeof l);
    const int64_t *more = sizes + sizeof l / sizeof *sizes;
    int64_t i = l.c / l.groups, o = l.o / l.groups, taps = taps_of(&l), pixels = l.n * l.p * l.q;
    int apart = channelwise(&l);
    turn job = {w, scratch, apart ? 1 : l.groups, apart ? l.o : o, i, taps, o * more[0], more[0], more[1], more[2]};
    turned(&job, threads);
    int64_t laid_out = job.groups * pieces(job.lanes, LANES) * taps * i * LANES;
    const int64_t used = i * (int64_t)sizeof *x;
    const float *map = framed(&l, x, scratch + laid_out, used, used, 0, threads);
    int64_t blocks = pieces(o, LANES);
    sums s = {&l, map, scratch, y, blocks, {i, pixels, pieces(blocks, 2), pieces(pixels, PIXELS)},
              runs_of(&l, l.c, i), (int)more[3]};
    int64_t bytes = pixels * l.o * i * taps / DIFFERENCES_PER_BYTE;
    if (apart) et_parallel(add_channelwise, &s, pixels, bytes, threads);
    else et_parallel(add_differences, &s, l.groups * s.cuts.strips * s.cuts.tiles, bytes, threads);
}
