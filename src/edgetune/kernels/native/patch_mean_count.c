/* patch_mean and mask_count of the same cells: the count reads each row of cells while it is in the cache. */
#include "cells_types.h"

typedef struct { cells mean, count; int channels_last; } both;

static void mean_count_rows(const void *job, int64_t begin, int64_t end) {
    const both *both = job;
    for (int64_t item = begin; item < end; item++) {
        if (both->channels_last) {
            images_patch_mean(&both->mean, item, item + 1);
            images_mask_count(&both->count, item, item + 1);
        } else {
            planes_patch_mean(&both->mean, item, item + 1);
            planes_mask_count(&both->count, item, item + 1);
        }
    }
}

void NAME(et_patch_mean_count)(const element *x, element *mean, void *count, float low, float high, int64_t n,
                               int64_t c, int64_t h, int64_t w, int64_t cell_h, int64_t cell_w, int channels_last,
                               int threads) {
    both job = {grid(n, c, h, w, cell_h, cell_w), grid(n, c, h, w, cell_h, cell_w), channels_last};
    job.mean.x = job.count.x = x;
    job.mean.out = mean;
    job.count.out = count;
    job.count.low = low;
    job.count.high = high;
    if (elements(&job.mean) == 0) return;
    et_parallel(mean_count_rows, &job, n * job.mean.p * (channels_last ? 1 : c),
                elements(&job.mean) * (int64_t)sizeof *x, threads);
}
