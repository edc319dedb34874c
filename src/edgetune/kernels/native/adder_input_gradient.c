/* gx[i, l] = sum over filters, and over the taps that read the pixel, of clip(w - x, -1, 1) gy.
 *
 * Eight channels of a few pixels meet all filters of one tap: x and the sums stay in registers, each value of gy is
 * spread over all lanes. Filters are laid out once a call: (group, block of 8 channels, tap, filter, 8). */
#include "adder.h"

typedef struct {
    const layer *l;
    const float *gy, *x, *filters;
    float *gx;
    int64_t groups, i, o, blocks;  /* groups of lanes; channels, filters and blocks of 8 channels of each */
    int apart;                     /* whether gy, too, has the channels in its lanes */
} pull;

/* One tap's gradient for `pixels` pixels, a constant: gx += clip(w - x, -1, 1) gy over all filters, eight channels.
 * Pixel k's are at x and gx + at + k * step, and its gy at gy + k * o. */
static inline __attribute__((always_inline)) void pull_pixels(const pull *t, int64_t at, int64_t step, const float *gy,
                                                              const float *w, int count, int pixels) {
    const v8 low = v8_all(-1), high = v8_all(1);
    const float *g[PIXELS];
    v8 acc[PIXELS], x[PIXELS];
    for (int k = 0; k < pixels; k++) {
        g[k] = gy + k * t->l->o;
        x[k] = load8(t->x + at + k * step, count);
        acc[k] = load8(t->gx + at + k * step, count);
    }
    for (int64_t o = 0; o < t->o; o++) {
        v8 eight = v8_load(w + o * LANES);
        for (int k = 0; k < pixels; k++) {
            v8 slope = v8_most(low, v8_least(high, v8_less(eight, x[k])));
            acc[k] = v8_fma(slope, v8_all(g[k][o]), acc[k]);
        }
    }
    for (int k = 0; k < pixels; k++) store8(t->gx + at + k * step, acc[k], count);
}

/* Output pixels first..last of a row whose tap at this offset reads a pixel of the map. */
static inline void seen_by(int64_t offset, int64_t stride, int64_t size, int64_t out, int64_t *first, int64_t *last) {
    *first = offset < 0 ? pieces(-offset, stride) : 0;
    *last = offset >= size ? -1 : least(out - 1, (size - 1 - offset) / stride);
}

/* Output row p sends its gradient through tap (u, v) to a row of gx, eight channels of it: x, gx at channel `c`. */
static void pull_row(const pull *t, int64_t x_row, int64_t g_row, int64_t v, int64_t c, int64_t g_at, const float *w,
                     int count) {
    const layer *l = t->l;
    int64_t offset = v * l->dil_w - l->left, first, last;
    seen_by(offset, l->stride_w, l->w, l->q, &first, &last);
    for (int64_t q = first; q <= last; q += PIXELS) {
        int64_t at = (x_row + q * l->stride_w + offset) * l->c + c, step = l->stride_w * l->c;
        const float *gy = t->gy + (g_row + q) * l->o + g_at;
        switch (last - q) {
        case 0: pull_pixels(t, at, step, gy, w, count, 1); break;
        case 1: pull_pixels(t, at, step, gy, w, count, 2); break;
        case 2: pull_pixels(t, at, step, gy, w, count, 3); break;
        default: pull_pixels(t, at, step, gy, w, count, PIXELS);
        }
    }
}

/* The same where gy has the channels in its lanes. */
static void pull_row_apart(const pull *t, int64_t x_row, int64_t g_row, int64_t v, int64_t c, const float *w,
                           int count) {
    const layer *l = t->l;
    const v8 eight = v8_load(w), low = v8_all(-1), high = v8_all(1);
    int64_t offset = v * l->dil_w - l->left, first, last;
    seen_by(offset, l->stride_w, l->w, l->q, &first, &last);
    for (int64_t q = first; q <= last; q++) {
        int64_t at = (x_row + q * l->stride_w + offset) * l->c + c;
        v8 slope = v8_most(low, v8_least(high, v8_less(eight, load8(t->x + at, count))));
        v8 sum = v8_fma(slope, load8(t->gy + (g_row + q) * l->o + c, count), load8(t->gx + at, count));
        store8(t->gx + at, sum, count);
    }
}

/* Items are (group, block of channels, row of gx). */
static void pull_rows(const void *job, int64_t begin, int64_t end) {
    const pull *t = job;
    const layer *l = t->l;
    int64_t rows = l->n * l->h, tap = t->o * LANES;
    for (int64_t item = begin; item < end; item++) {
        int64_t row = item % rows, block = item / rows % t->blocks, group = item / rows / t->blocks;
        int64_t c = group * t->i + block * LANES, height = row % l->h, sample = row / l->h;
        int count = (int)least(LANES, t->i - block * LANES);
        const float *w = t->filters + (group * t->blocks + block) * taps_of(l) * tap;
        for (int64_t k = 0; k < l->w; k++) store8(t->gx + (row * l->w + k) * l->c + c, v8_all(0), count);
        for (int64_t u = 0; u < l->u; u++) {
            int64_t reach = height + l->top - u * l->dil_h, p = reach / l->stride_h;
            if (reach < 0 || reach % l->stride_h || p >= l->p) continue;
            int64_t g_row = (sample * l->p + p) * l->q;
            for (int64_t v = 0; v < l->v; v++) {
                const float *filters = w + (u * l->v + v) * tap;
                if (t->apart) pull_row_apart(t, row * l->w, g_row, v, c, filters, count);
                else pull_row(t, row * l->w, g_row, v, c, group * t->o, filters, count);
            }
        }
    }
}

/* None of the sizes is 0. sizes: those of `layer`, then steps of w in elements (filter, channel, tap). scratch: the
 * filters laid out, each block of 8 whole. gy, x and gx lie channels last. */
void et_adder_conv_input_gradient_f32(const float *gy, const float *x, const float *w, float *gx, float *scratch,
                                      const int64_t *sizes, int threads) {
    layer l;
    memcpy(&l, sizes, sizeof l);
    const int64_t *more = sizes + sizeof l / sizeof *sizes;
    int64_t i = l.c / l.groups, o = l.o / l.groups;
    int apart = channelwise(&l);
    turn job = {w, scratch, apart ? 1 : l.groups, apart ? l.c : i, o, taps_of(&l), o * more[0],
                apart ? more[0] : more[1], more[0], more[2]};
    turned(&job, threads);
    pull t = {&l, gy, x, scratch, gx, job.groups, job.lanes, o, pieces(job.lanes, LANES), apart};
    et_parallel(pull_rows, &t, t.groups * t.blocks * l.n * l.h,
                l.n * l.p * l.q * l.o * i * taps_of(&l) / DIFFERENCES_PER_BYTE, threads);
}
