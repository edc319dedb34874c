/* patch_mean and mask_count of the same cells: the count reads each row of cells while it is in the cache. */
#include "cells_types.h"

enum { NEAR_ELEMENTS = 4096 };  /* as many stay in the first-level cache */

typedef struct { cells mean, count; int channels_last; int64_t step; } both;

static void mean_count_rows(const void *job, int64_t begin, int64_t end) {
    const both *both = job;
    for (int64_t item = begin; item < end; item += both->step) {
        int64_t stop = least(item + both->step, end);
        (both->channels_last ? images_patch_mean : planes_patch_mean)(&both->mean, item, stop);
        (both->channels_last ? images_mask_count : planes_mask_count)(&both->count, item, stop);
    }
}

void NAME(et_patch_mean_count)(const element *x, element *mean, void *count, float low, float high, int64_t n,
                               int64_t c, int64_t h, int64_t w, int64_t cell_h, int64_t cell_w, int channels_last,
                               int threads) {
    both job = {grid(n, c, h, w, cell_h, cell_w), grid(n, c, h, w, cell_h, cell_w), channels_last, 1};
    job.mean.x = job.count.x = x;
    job.mean.out = mean;
    job.count.out = count;
    job.count.low = low;
    job.count.high = high;
    if (elements(&job.mean) == 0) return;
    if (!channels_last) job.step += NEAR_ELEMENTS / (cell_h * w);
    et_parallel(mean_count_rows, &job, n * job.mean.p * (channels_last ? 1 : c),
                elements(&job.mean) * (int64_t)sizeof *x, threads);
}
