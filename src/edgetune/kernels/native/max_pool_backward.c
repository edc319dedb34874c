/* Transpose of the max-pool: gy, index (n c p q) -> gx (n c h w), float32. In `pool`, x is gy and y is gx. */

/* Offset of every window position from the window's first pixel, in pixels of the plane. */
typedef struct { pool pool; int64_t offset[NOTHING + 1]; int64_t taps, block, p0, p1, q0, q1; } unpool;

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

/* Outputs [from, to) of a row over `width` channels that lie side by side (1 where planes are walked). */
static inline __attribute__((always_inline)) void unpool_part(
        const unpool *job, const float *gy, const uint8_t *index, float *gx, int64_t p, int64_t from, int64_t to,
        int64_t pixel, int64_t width, int inside) {
    const pool *pool = &job->pool;
    int64_t start = (p * pool->stride_h - pool->pad_h) * pool->w - pool->pad_w;
    for (int64_t q = from; q < to; q++) {
        float *window = gx + (start + q * pool->stride_w) * pixel;
        for (int64_t j = 0; j < width; j++) {
            int position = index[q * pixel + j];
            if (position < job->taps && (inside || lies_inside(pool, p, q, position)))
                window[job->offset[position] * pixel + j] += gy[q * pixel + j];
        }
    }
}

static inline __attribute__((always_inline)) void unpool_row(
        const unpool *job, const float *gy, const uint8_t *index, float *gx, int64_t p, int64_t pixel, int64_t width) {
    int64_t q0 = job->q0, q1 = job->q1, all = job->pool.q;
    if (p < job->p0 || p >= job->p1 || q0 >= q1) {
        unpool_part(job, gy, index, gx, p, 0, all, pixel, width, 0);
        return;
    }
    unpool_part(job, gy, index, gx, p, 0, q0, pixel, width, 0);
    unpool_part(job, gy, index, gx, p, q0, q1, pixel, width, 1);
    unpool_part(job, gy, index, gx, p, q1, all, pixel, width, 0);
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

enum { UNPOOL_CHANNELS = 64 };  /* a block where there are fewer images than threads */

/* Items are blocks of channels of an image, channels last; each row is zeroed just before it is first added to. */
static void unpool_images(const void *given, int64_t begin, int64_t end) {
    const unpool *job = given;
    const pool *pool = &job->pool;
    for (int64_t item = begin; item < end; item++) {
        int64_t blocks = (pool->c + job->block - 1) / job->block, image = item / blocks;
        int64_t channel = item % blocks * job->block, width = least(job->block, pool->c - channel), zeroed = 0;
        int64_t reach = (pool->kernel_h - 1) * pool->dil_h + 1 - pool->pad_h;
        float *gx = pool->y + image * pool->h * pool->w * pool->c + channel;
        for (int64_t p = 0; p < pool->p; p++) {
            int64_t touched = p + 1 == pool->p ? pool->h : least(p * pool->stride_h + reach, pool->h);
            for (; zeroed < touched * pool->w; zeroed++) memset(gx + zeroed * pool->c, 0, (size_t)width * sizeof *gx);
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
    inner(geometry->h, geometry->p, geometry->kernel_h, geometry->stride_h, geometry->pad_h, geometry->dil_h, &job.p0,
          &job.p1);
    inner(geometry->w, geometry->q, geometry->kernel_w, geometry->stride_w, geometry->pad_w, geometry->dil_w, &job.q0,
          &job.q1);
    job.block = geometry->n >= threads ? geometry->c : UNPOOL_CHANNELS;
    int64_t blocks = (geometry->c + job.block - 1) / job.block;
    int64_t items = geometry->n * (channels_last ? blocks : geometry->c);
    et_parallel(channels_last ? unpool_images : unpool_planes, &job, items, bytes, threads);
}
