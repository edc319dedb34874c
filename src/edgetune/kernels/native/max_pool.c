/* Max-pool that keeps one byte an output: x (n c h w) -> y, index (n c p q), and its transpose.
 *
 * The first largest element of a window wins; a NaN wins over everything, the last one of several. Every position of
 * the window passes over a row of outputs (or of channels), so that the inner loops have no branches. */
#include "simd.h"
#include "threads.h"

typedef struct {
    const element *x;
    element *y;
    uint8_t *index;
    int64_t n, c, h, w, p, q;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
} pool;

enum { POOL_TILE = 256, NOTHING = 255 };

/* `best` and `where` after one more position; where -1 means that nothing was seen yet, and
 * ends as NOTHING in a window of padding only. */
static inline void challenge(float *best, int32_t *where, const element *x, int64_t stride, int64_t count,
                                   int32_t position) {
    for (int64_t i = 0; i < count; i++) {
        float v = to_float(x[i * stride]);
        int wins = (v > best[i]) | (v != v) | (where[i] < 0);
        best[i] = wins ? v : best[i];
        where[i] = wins ? position : where[i];
    }
}

static inline void settle(element *y, uint8_t *index, const float *best, const int32_t *where, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        y[i] = from_float(best[i]);
        index[i] = (uint8_t)where[i];
    }
}

static inline void clear(float *best, int32_t *where, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        best[i] = -__builtin_inff();
        where[i] = -1;
    }
}

/* The first output whose window position `offset` (in pixels from the window's start) is at or beyond pixel `size`. */
static inline int64_t first_at(int64_t size, int64_t offset, int64_t pad, int64_t stride, int64_t outputs) {
    int64_t start = size + pad - offset;
    int64_t first = start <= 0 ? 0 : (start + stride - 1) / stride;
    return least(first, outputs);
}

static void pool_row(const pool *pool, const element *plane, element *y, uint8_t *index, int64_t p,
                           int64_t q0, int64_t q1) {
    float best[POOL_TILE];
    int32_t where[POOL_TILE];
    clear(best, where, q1 - q0);
    for (int64_t u = 0; u < pool->kernel_h; u++) {
        int64_t row = p * pool->stride_h - pool->pad_h + u * pool->dil_h;
        if (row < 0 || row >= pool->h) continue;
        for (int64_t v = 0; v < pool->kernel_w; v++) {
            int64_t offset = v * pool->dil_w, stride = pool->stride_w;
            int64_t from = first_at(0, offset, pool->pad_w, stride, q1);
            int64_t to = first_at(pool->w, offset, pool->pad_w, stride, q1);
            if (from < q0) from = q0;
            if (from >= to) continue;
            const element *x = plane + row * pool->w + from * stride - pool->pad_w + offset;
            int32_t position = (int32_t)(u * pool->kernel_w + v);
            if (stride == 2) challenge(best + from - q0, where + from - q0, x, 2, to - from, position);
            else if (stride == 1) challenge(best + from - q0, where + from - q0, x, 1, to - from, position);
            else challenge(best + from - q0, where + from - q0, x, stride, to - from, position);
        }
    }
    settle(y + q0, index + q0, best, where, q1 - q0);
}

/* Items are rows of outputs. */
static void pool_planes(const void *job, int64_t begin, int64_t end) {
    const pool *pool = job;
    for (int64_t item = begin; item < end; item++) {
        const element *plane = pool->x + item / pool->p * pool->h * pool->w;
        for (int64_t q = 0; q < pool->q; q += POOL_TILE)
            pool_row(pool, plane, pool->y + item * pool->q, pool->index + item * pool->q, item % pool->p, q,
                           least(q + POOL_TILE, pool->q));
    }
}

/* Channels last: one output pixel, a tile of channels. */
static void pool_pixel(const pool *pool, int64_t item, int64_t q, int64_t channel, int64_t channels) {
    const element *image = pool->x + item / pool->p * pool->h * pool->w * pool->c + channel;
    int64_t top = item % pool->p * pool->stride_h - pool->pad_h, left = q * pool->stride_w - pool->pad_w;
    float best[POOL_TILE];
    int32_t where[POOL_TILE];
    clear(best, where, channels);
    for (int64_t u = 0; u < pool->kernel_h; u++) {
        int64_t row = top + u * pool->dil_h;
        if (row < 0 || row >= pool->h) continue;
        for (int64_t v = 0; v < pool->kernel_w; v++) {
            int64_t column = left + v * pool->dil_w;
            if (column < 0 || column >= pool->w) continue;
            challenge(best, where, image + (row * pool->w + column) * pool->c, 1, channels,
                            (int32_t)(u * pool->kernel_w + v));
        }
    }
    int64_t to = (item * pool->q + q) * pool->c + channel;
    settle(pool->y + to, pool->index + to, best, where, channels);
}

static void pool_images(const void *job, int64_t begin, int64_t end) {
    const pool *pool = job;
    for (int64_t item = begin; item < end; item++)
        for (int64_t q = 0; q < pool->q; q++)
            for (int64_t channel = 0; channel < pool->c; channel += POOL_TILE)
                pool_pixel(pool, item, q, channel, least(POOL_TILE, pool->c - channel));
}

void NAME(et_max_pool)(const element *x, element *y, uint8_t *index, const int64_t *sizes, int channels_last,
                       int threads) {
    pool job = {.x = x, .y = y, .index = index};
    memcpy(&job.n, sizes, 14 * sizeof *sizes);
    int64_t bytes = job.n * job.c * job.h * job.w * (int64_t)sizeof *x;
    if (bytes == 0) return;
    if (channels_last) et_parallel(pool_images, &job, job.n * job.p, bytes, threads);
    else et_parallel(pool_planes, &job, job.n * job.c * job.p, bytes, threads);
}
