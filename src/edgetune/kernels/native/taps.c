/* Sum over the taps of a kernel, and its transpose: w (pairs taps) -> out (pairs); gw (pairs) -> out (pairs taps). */
#include "simd.h"
#include "threads.h"

typedef struct { const element *from; element *to; int64_t taps; } tap_job;

/* With `taps` constant the compiler unrolls the sum; pairs are independent, so several are in flight. */
static inline void sum_each(const tap_job *job, int64_t begin, int64_t end, int64_t taps) {
    for (int64_t i = begin; i < end; i++) {
        const element *w = job->from + i * taps;
        float even = 0, odd = 0;
        int64_t t = 0;
        for (; t + 2 <= taps; t += 2) {
            even += to_float(w[t]);
            odd += to_float(w[t + 1]);
        }
        if (t < taps) even += to_float(w[t]);
        job->to[i] = from_float(even + odd);
    }
}

static void tap_sums(const void *job, int64_t begin, int64_t end) {
    const tap_job *taps = job;
    if (taps->taps == 1) memcpy(taps->to + begin, taps->from + begin, (size_t)(end - begin) * sizeof *taps->to);
    else if (taps->taps == 9) sum_each(taps, begin, end, 9);
    else if (taps->taps == 25) sum_each(taps, begin, end, 25);
    else sum_each(taps, begin, end, taps->taps);
}

static inline void spread_each(const tap_job *job, int64_t begin, int64_t end, int64_t taps) {
    for (int64_t i = begin; i < end; i++)
        for (int64_t t = 0; t < taps; t++) job->to[i * taps + t] = job->from[i];
}

static void tap_copies(const void *job, int64_t begin, int64_t end) {
    const tap_job *taps = job;
    if (taps->taps == 1) memcpy(taps->to + begin, taps->from + begin, (size_t)(end - begin) * sizeof *taps->to);
    else if (taps->taps == 9) spread_each(taps, begin, end, 9);
    else spread_each(taps, begin, end, taps->taps);
}

void NAME(et_tap_sum)(const element *w, element *out, int64_t pairs, int64_t taps, int threads) {
    tap_job job = {w, out, taps};
    et_parallel(tap_sums, &job, pairs, pairs * taps * (int64_t)sizeof *w, threads);
}

void NAME(et_tap_spread)(const element *gw, element *out, int64_t pairs, int64_t taps, int threads) {
    tap_job job = {gw, out, taps};
    et_parallel(tap_copies, &job, pairs, pairs * taps * (int64_t)sizeof *gw, threads);
}
