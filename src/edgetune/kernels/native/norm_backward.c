/* Backward of a norm with frozen statistics, and of the mask behind it, in one pass: g, x (n c h w) -> gx, gw, gb (c).
 *
 * Without `bits` nothing is masked, without `x` the scale's gradient is left out, without `gx` the input's. `scratch`
 * holds what each channel is multiplied by (c), and channels last two sums of every block of rows (blocks 2 c). */
#include <math.h>

#include "simd.h"
#include "threads.h"

enum { FLUSH = 4096 };  /* elements of a plane that are summed in float */

typedef struct {
    const element *g, *x;
    const uint8_t *bits;
    const float *weight, *mean, *var;
    element *gx;
    float *gw, *gb, *scratch;
    int64_t n, c, pixels, rows_each;
    float eps;
} norm;

static inline v8 norm_given(const norm *norm, int64_t at, int count) {
    v8 g = load8(norm->g + at, count);
    return norm->bits ? v8_keep(g, bits8(norm->bits, at, count)) : g;
}

static float norm_inverse(const norm *norm, int64_t channel) { return 1 / sqrtf(norm->var[channel] + norm->eps); }

static double norm_total(v8 a) {
    float lanes[8];
    double sum = 0;
    v8_store(lanes, a);
    for (int i = 0; i < 8; i++) sum += lanes[i];
    return sum;
}

/* Items are channels. */
static void norm_planes(const void *job, int64_t begin, int64_t end) {
    const norm *norm = job;
    for (int64_t channel = begin; channel < end; channel++) {
        v8 scale = v8_all(norm->scratch[channel]), shift = v8_all(-norm->mean[channel]);
        double sum = 0, dot = 0;
        for (int64_t sample = 0; sample < norm->n; sample++) {
            int64_t at = (sample * norm->c + channel) * norm->pixels, last = at + norm->pixels;
            while (at < last) {
                v8 s = v8_all(0), d = v8_all(0);
                for (int64_t stop = least(last, at + FLUSH); at < stop; at += 8) {
                    int count = (int)least(8, stop - at);
                    v8 g = norm_given(norm, at, count);
                    s = v8_add(s, g);
                    /* lanes beyond the plane hold 0 in g, and the mean in x */
                    if (norm->x) d = v8_fma(g, v8_add(load8(norm->x + at, count), shift), d);
                    if (norm->gx) store8(norm->gx + at, v8_mul(g, scale), count);
                }
                sum += norm_total(s);
                dot += norm_total(d);
                at = least(at, last);
            }
        }
        norm->gb[channel] = (float)sum;
        if (norm->x) norm->gw[channel] = (float)(dot * norm_inverse(norm, channel));
    }
}

/* Items are blocks of rows, each a pixel's channels side by side; sums and dots are the block's own. */
static void norm_rows(const void *job, int64_t begin, int64_t end) {
    const norm *norm = job;
    int64_t c = norm->c, rows = norm->n * norm->pixels;
    for (int64_t block = begin; block < end; block++) {
        float *sums = norm->scratch + (1 + 2 * block) * c, *dots = sums + c;
        memset(sums, 0, (size_t)(2 * c) * sizeof *sums);
        for (int64_t row = block * norm->rows_each; row < least(rows, (block + 1) * norm->rows_each); row++)
            for (int64_t channel = 0; channel < c; channel += 8) {
                int count = (int)least(8, c - channel);
                int64_t at = row * c + channel;
                v8 g = norm_given(norm, at, count);
                part_store(sums + channel, v8_add(part_load(sums + channel, count), g), count);
                if (norm->x) {
                    v8 mean = part_load(norm->mean + channel, count);
                    v8 centred = v8_fma(mean, v8_all(-1), load8(norm->x + at, count));
                    part_store(dots + channel, v8_fma(g, centred, part_load(dots + channel, count)), count);
                }
                if (norm->gx) store8(norm->gx + at, v8_mul(g, part_load(norm->scratch + channel, count)), count);
            }
    }
}

/* Adds up the blocks, in their order. */
static void norm_finish(const norm *norm, int64_t blocks) {
    for (int64_t channel = 0; channel < norm->c; channel++) {
        double sum = 0, dot = 0;
        for (int64_t block = 0; block < blocks; block++) {
            sum += norm->scratch[(1 + 2 * block) * norm->c + channel];
            dot += norm->scratch[(2 + 2 * block) * norm->c + channel];
        }
        norm->gb[channel] = (float)sum;
        if (norm->x) norm->gw[channel] = (float)(dot * norm_inverse(norm, channel));
    }
}

/* Blocks of `rows_each` rows each; none, and 0 rows, where it does not lie channels last. */
void NAME(et_norm_backward)(const element *g, const uint8_t *bits, const element *x, const float *weight,
                            const float *mean, const float *var, element *gx, float *gw, float *gb, float *scratch,
                            int64_t n, int64_t c, int64_t pixels, int64_t rows_each, int64_t blocks, float eps,
                            int threads) {
    norm job = {g, x, bits, weight, mean, var, gx, gw, gb, scratch, n, c, pixels, rows_each, eps};
    int64_t bytes = (1 + !!x + !!gx) * n * c * pixels * (int64_t)sizeof *g;
    for (int64_t channel = 0; channel < c; channel++)
        scratch[channel] = norm_inverse(&job, channel) * (weight ? weight[channel] : 1);
    if (rows_each == 0) {
        et_parallel(norm_planes, &job, c, bytes, threads);
        return;
    }
    et_parallel(norm_rows, &job, blocks, bytes, threads);
    norm_finish(&job, blocks);
}
