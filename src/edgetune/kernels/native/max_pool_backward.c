/* Transpose of the max-pool: gy, index (n c p q) -> gx (n c h w), float32. In `pool`, x is gy and y is gx. */

/* Offset of every window position from the window's first pixel, in pixels of the plane. */
typedef struct { pool pool; int64_t offset[NOTHING + 1]; int64_t taps; } unpool;

/* Whether the winner at this position of output (p, q) lies in the map: a damaged index must not write elsewhere. */
static int lies_inside(const pool *pool, int64_t p, int64_t q, int position) {
    int64_t row = p * pool->stride_h - pool->pad_h + position / pool->kernel_w * pool->dil_h;
    int64_t column = q * pool->stride_w - pool->pad_w + position % pool->kernel_w * pool->dil_w;
    return row >= 0 && row < pool->h && column >= 0 && column < pool->w;
}

/* Outputs [first, last) of an axis have windows that lie in the map entirely. */
static void inner(int64_t size, int64_t outputs, int64_t kernel, int64_t stride, int64_t pad, int64_t dil,
                  int64_t *first, int64_t *last) {
    int64_t room = size - 1 - (kernel - 1) * dil + pad;
    *first = least((pad + stride - 1) / stride, outputs);
    *last = room < 0 ? 0 : least(room / stride + 1, outputs);
}

/* One row of outputs over `width` channels that lie side by side (1 where planes are walked). */
static inline void unpool_row(const unpool *job, const float *gy, const uint8_t *index, float *gx, int64_t p,
                              int64_t pixel, int64_t width) {
    const pool *pool = &job->pool;
    int64_t p0, p1, q0, q1;
    inner(pool->h, pool->p, pool->kernel_h, pool->stride_h, pool->pad_h, pool->dil_h, &p0, &p1);
    inner(pool->w, pool->q, pool->kernel_w, pool->stride_w, pool->pad_w, pool->dil_w, &q0, &q1);
    int row_inside = p >= p0 && p < p1;
    int64_t start = (p * pool->stride_h - pool->pad_h) * pool->w - pool->pad_w;
    for (int64_t q = 0; q < pool->q; q++, gy += pixel, index += pixel) {
        int inside = row_inside && q >= q0 && q < q1;
        float *to = gx + (start + q * pool->stride_w) * pixel;
        for (int64_t j = 0; j < width; j++) {
            int position = index[j];
            if (position < job->taps && (inside || lies_inside(pool, p, q, position)))
                to[job->offset[position] * pixel + j] += gy[j];
        }
    }
}

/* Items are planes. */
static void unpool_planes(const void *given, int64_t begin, int64_t end) {
    const unpool *job = given;
    const pool *pool = &job->pool;
    for (int64_t item = begin; item < end; item++) {
        float *gx = pool->y + item * pool->h * pool->w;
        memset(gx, 0, (size_t)(pool->h * pool->w) * sizeof *gx);
        for (int64_t p = 0; p < pool->p; p++) {
            int64_t from = (item * pool->p + p) * pool->q;
            unpool_row(job, pool->x + from, pool->index + from, gx, p, 1, 1);
        }
    }
}

enum { UNPOOL_CHANNELS = 64 };

static inline int64_t channel_blocks(int64_t c) { return (c + UNPOOL_CHANNELS - 1) / UNPOOL_CHANNELS; }

/* Items are blocks of channels of an image, channels last. */
static void unpool_images(const void *given, int64_t begin, int64_t end) {
    const unpool *job = given;
    const pool *pool = &job->pool;
    for (int64_t item = begin; item < end; item++) {
        int64_t image = item / channel_blocks(pool->c), channel = item % channel_blocks(pool->c) * UNPOOL_CHANNELS;
        int64_t width = least(UNPOOL_CHANNELS, pool->c - channel);
        float *gx = pool->y + image * pool->h * pool->w * pool->c + channel;
        for (int64_t pixel = 0; pixel < pool->h * pool->w; pixel++)
            memset(gx + pixel * pool->c, 0, (size_t)width * sizeof *gx);
        for (int64_t p = 0; p < pool->p; p++) {
            int64_t from = (image * pool->p + p) * pool->q * pool->c + channel;
            unpool_row(job, pool->x + from, pool->index + from, gx, p, pool->c, width);
        }
    }
}

void et_max_pool_backward_f32(const float *gy, uint8_t *index, float *gx, const int64_t *sizes, int channels_last,
                              int threads) {
    unpool job = {.pool = {.x = gy, .y = gx, .index = index}};
    pool *geometry = &job.pool;
    memcpy(&geometry->n, sizes, 14 * sizeof *sizes);
    job.taps = least(geometry->kernel_h * geometry->kernel_w, NOTHING);
    for (int64_t tap = 0; tap < job.taps; tap++)
        job.offset[tap] = tap / geometry->kernel_w * geometry->dil_h * geometry->w
                          + tap % geometry->kernel_w * geometry->dil_w;
    int64_t bytes = geometry->n * geometry->c * geometry->h * geometry->w * (int64_t)sizeof *gx;
    if (bytes == 0) return;
    int64_t items = geometry->n * (channels_last ? channel_blocks(geometry->c) : geometry->c);
    et_parallel(channels_last ? unpool_images : unpool_planes, &job, items, bytes, threads);
}
