/* Transpose of the max-pool: gy, index (n c p q) -> gx (n c h w), float32. In `pool`, x is gy and y is gx. */

/* Offset, in pixels of its plane, of the element that won output (p, q), or -1. */
static inline int64_t winner(const pool *pool, int64_t p, int64_t q, int position) {
    if (position == NOTHING) return -1;
    int64_t row = p * pool->stride_h - pool->pad_h + position / (int)pool->kernel_w * pool->dil_h;
    int64_t column = q * pool->stride_w - pool->pad_w + position % (int)pool->kernel_w * pool->dil_w;
    return (uint64_t)row < (uint64_t)pool->h && (uint64_t)column < (uint64_t)pool->w ? row * pool->w + column : -1;
}

/* Items are planes. */
static void unpool_planes(const void *job, int64_t begin, int64_t end) {
    const pool *pool = job;
    for (int64_t item = begin; item < end; item++) {
        const float *gy = pool->x + item * pool->p * pool->q;
        const uint8_t *index = pool->index + item * pool->p * pool->q;
        float *gx = pool->y + item * pool->h * pool->w;
        memset(gx, 0, (size_t)(pool->h * pool->w) * sizeof *gx);
        for (int64_t p = 0; p < pool->p; p++)
            for (int64_t q = 0; q < pool->q; q++, gy++, index++) {
                int64_t at = winner(pool, p, q, *index);
                if (at >= 0) gx[at] += *gy;
            }
    }
}

/* Items are blocks of UNPOOL_CHANNELS channels of an image, channels last. */
enum { UNPOOL_CHANNELS = 64 };

static void unpool_images(const void *job, int64_t begin, int64_t end) {
    const pool *pool = job;
    int64_t blocks = (pool->c + UNPOOL_CHANNELS - 1) / UNPOOL_CHANNELS;
    for (int64_t item = begin; item < end; item++) {
        int64_t image = item / blocks, channel = item % blocks * UNPOOL_CHANNELS;
        int64_t channels = least(UNPOOL_CHANNELS, pool->c - channel);
        float *gx = pool->y + image * pool->h * pool->w * pool->c + channel;
        for (int64_t pixel = 0; pixel < pool->h * pool->w; pixel++)
            memset(gx + pixel * pool->c, 0, (size_t)channels * sizeof *gx);
        for (int64_t p = 0; p < pool->p; p++)
            for (int64_t q = 0; q < pool->q; q++) {
                int64_t from = ((image * pool->p + p) * pool->q + q) * pool->c + channel;
                for (int64_t j = 0; j < channels; j++) {
                    int64_t at = winner(pool, p, q, pool->index[from + j]);
                    if (at >= 0) gx[at * pool->c + j] += pool->x[from + j];
                }
            }
    }
}

void et_max_pool_backward_f32(const float *gy, uint8_t *index, float *gx, const int64_t *sizes, int channels_last,
                              int threads) {
    pool job = {.x = gy, .y = gx, .index = index};
    memcpy(&job.n, sizes, 14 * sizeof *sizes);
    int64_t bytes = job.n * job.c * job.h * job.w * (int64_t)sizeof *gx;
    if (bytes == 0) return;
    int64_t blocks = (job.c + UNPOOL_CHANNELS - 1) / UNPOOL_CHANNELS;
    et_parallel(channels_last ? unpool_images : unpool_planes, &job, job.n * (channels_last ? blocks : job.c), bytes,
                threads);
}
