/* Max-pool that keeps one byte an output: x (n c h w) -> y, index (n c p q).
 *
 * The first largest element of a window wins; a NaN wins over everything, the last one of several. Positions are
 * counted in floats, which blend like the values; -1 means that nothing was seen yet, and ends as NOTHING. */
#include "simd.h"
#include "threads.h"

typedef struct {
    const element *x;
    element *y;
    uint8_t *index;
    int64_t n, c, h, w, p, q;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
} pool;

enum { NOTHING = 255 };

static inline void settle(const pool *pool, int64_t to, v8 best, v8 where, int count) {
    v8 zero = v8_all(0), unseen = v8_all(NOTHING);
    v8_challenge(&zero, &where, zero, unseen);  /* 0 beats no 0: only lanes below 0 in `where` change */
    store8(pool->y + to, best, count);
    bytes8(pool->index + to, where, count);
}

/* One output, wherever its window lies. */
static void pool_one(const pool *pool, const element *plane, int64_t to, int64_t top, int64_t left) {
    float best = -__builtin_inff();
    int where = -1;
    for (int64_t u = 0; u < pool->kernel_h; u++) {
        int64_t row = top + u * pool->dil_h;
        if (row < 0 || row >= pool->h) continue;
        for (int64_t v = 0; v < pool->kernel_w; v++) {
            int64_t column = left + v * pool->dil_w;
            if (column < 0 || column >= pool->w) continue;
            float value = to_float(plane[row * pool->w + column]);
            if (value > best || value != value || where < 0) {
                best = value;
                where = (int)(u * pool->kernel_w + v);
            }
        }
    }
    pool->y[to] = from_float(best);
    pool->index[to] = where < 0 ? NOTHING : (uint8_t)where;
}

/* `count` elements, `stride` (1 or 2) apart. */
static inline v8 strided8(const element *x, int64_t stride, int count) {
    if (stride == 1) return load8(x, count);
    int span = 2 * count - 1;
    return v8_evens(load8(x, span < 8 ? span : 8), span > 8 ? load8(x + 8, span - 8) : v8_all(0));
}

/* `count` neighbouring outputs whose windows lie inside of all columns. */
static inline void pool_eight(const pool *pool, const element *plane, int64_t to, int64_t top, int64_t left,
                              int64_t stride, int count) {
    v8 best = v8_all(-__builtin_inff()), where = v8_all(-1);
    for (int64_t u = 0; u < pool->kernel_h; u++) {
        int64_t row = top + u * pool->dil_h;
        if (row < 0 || row >= pool->h) continue;
        const element *x = plane + row * pool->w + left;
        for (int64_t v = 0; v < pool->kernel_w; v++)
            v8_challenge(&best, &where, strided8(x + v * pool->dil_w, stride, count),
                         v8_all((float)(u * pool->kernel_w + v)));
    }
    settle(pool, to, best, where, count);
}

/* Items are rows of outputs. */
static void pool_planes(const void *job, int64_t begin, int64_t end) {
    const pool *pool = job;
    int64_t stride = pool->stride_w, reach = (pool->kernel_w - 1) * pool->dil_w;
    int64_t first = least((pool->pad_w + stride - 1) / stride, pool->q);
    int64_t room = pool->w - 1 - reach + pool->pad_w;  /* the last inner window starts at or before this column */
    int64_t last = room < 0 || stride > 2 ? first : least(room / stride + 1, pool->q);
    for (int64_t item = begin; item < end; item++) {
        const element *plane = pool->x + item / pool->p * pool->h * pool->w;
        int64_t top = item % pool->p * pool->stride_h - pool->pad_h, to = item * pool->q, q = 0;
        for (; q < first; q++) pool_one(pool, plane, to + q, top, q * stride - pool->pad_w);
        for (; q < last; q += 8) {
            int count = (int)least(8, last - q);
            int64_t left = q * stride - pool->pad_w;
            if (stride == 1) pool_eight(pool, plane, to + q, top, left, 1, count);
            else if (count == 8) pool_eight(pool, plane, to + q, top, left, 2, 8);
            else pool_eight(pool, plane, to + q, top, left, 2, count);
        }
        for (q = last > first ? last : first; q < pool->q; q++)
            pool_one(pool, plane, to + q, top, q * stride - pool->pad_w);
    }
}

/* Channels last: `count` channels of one output pixel. */
static inline void pool_channels(const pool *pool, const element *image, int64_t to, int64_t top, int64_t left,
                                 int count) {
    v8 best = v8_all(-__builtin_inff()), where = v8_all(-1);
    for (int64_t u = 0; u < pool->kernel_h; u++) {
        int64_t row = top + u * pool->dil_h;
        if (row < 0 || row >= pool->h) continue;
        for (int64_t v = 0; v < pool->kernel_w; v++) {
            int64_t column = left + v * pool->dil_w;
            if (column < 0 || column >= pool->w) continue;
            v8_challenge(&best, &where, load8(image + (row * pool->w + column) * pool->c, count),
                         v8_all((float)(u * pool->kernel_w + v)));
        }
    }
    settle(pool, to, best, where, count);
}

static void pool_images(const void *job, int64_t begin, int64_t end) {
    const pool *pool = job;
    for (int64_t item = begin; item < end; item++) {
        const element *image = pool->x + item / pool->p * pool->h * pool->w * pool->c;
        int64_t top = item % pool->p * pool->stride_h - pool->pad_h;
        for (int64_t q = 0; q < pool->q; q++) {
            int64_t to = (item * pool->q + q) * pool->c, left = q * pool->stride_w - pool->pad_w, j = 0;
            for (; j + 8 <= pool->c; j += 8) pool_channels(pool, image + j, to + j, top, left, 8);
            if (j < pool->c) pool_channels(pool, image + j, to + j, top, left, (int)(pool->c - j));
        }
    }
}

void NAME(et_max_pool)(const element *x, element *y, uint8_t *index, const int64_t *sizes, int channels_last,
                       int threads) {
    pool job = {.x = x, .y = y, .index = index};
    memcpy(&job.n, sizes, 14 * sizeof *sizes);
    int64_t bytes = job.n * job.c * job.h * job.w * (int64_t)sizeof *x;
    if (bytes == 0) return;
    et_parallel(channels_last ? pool_images : pool_planes, &job, job.n * job.p * (channels_last ? 1 : job.c), bytes,
                threads);
}
