/* Filters laid out for lanes: w (group, lane, other, tap) in any order -> out (group, block of 8 lanes, tap, other, 8),
 * the last block filled up with 0. Lanes are filters or channels, and others the other of the two. */
#include "adder.h"

typedef struct {
    const float *w;
    float *out;
    int64_t groups, lanes, others, taps;                  /* lanes and others: of one group */
    int64_t group_step, lane_step, other_step, tap_step;  /* of w, in elements */
} turn;

/* Eight lanes at `length` places that lie side by side in w: rows become columns. The first `period` places are taps of
 * one other, the next those of the following one. */
static void turn_run(const turn *t, const float *from, float *to, int64_t count, int64_t length, int64_t period) {
    int64_t tap = 0, other = 0;
    for (int64_t at = 0; at < length; at += LANES) {
        int part = (int)least(LANES, length - at);
        v8 rows[LANES];
        for (int k = 0; k < LANES; k++) rows[k] = k < count ? load8(from + k * t->lane_step + at, part) : v8_all(0);
        v8_transpose(rows);
        for (int k = 0; k < part; k++) {
            v8_store(to + (tap * t->others + other) * LANES, rows[k]);
            if (++tap == period) tap = 0, other++;
        }
    }
}

/* Up to eight others of a block. */
static void turn_block(const turn *t, const float *from, float *to, int64_t count, int64_t others) {
    if (t->lane_step == 1) {
        for (int64_t tap = 0; tap < t->taps; tap++)
            for (int64_t k = 0; k < others; k++)
                v8_store(to + (tap * t->others + k) * LANES,
                         load8(from + k * t->other_step + tap * t->tap_step, (int)count));
    } else if (t->tap_step == 1 && t->other_step == t->taps) {
        turn_run(t, from, to, count, others * t->taps, t->taps);
    } else if (t->tap_step == 1) {
        for (int64_t k = 0; k < others; k++)
            turn_run(t, from + k * t->other_step, to + k * LANES, count, t->taps, t->taps);
    } else {
        for (int64_t tap = 0; tap < t->taps; tap++)
            turn_run(t, from + tap * t->tap_step, to + tap * t->others * LANES, count, others, 1);
    }
}

/* Items are (group, block of lanes, eight others). */
static void turn_filters(const void *job, int64_t begin, int64_t end) {
    const turn *t = job;
    int64_t blocks = pieces(t->lanes, LANES), parts = pieces(t->others, LANES);
    for (int64_t item = begin; item < end; item++) {
        int64_t other = item % parts * LANES, block = item / parts % blocks, group = item / parts / blocks;
        turn_block(t, t->w + group * t->group_step + block * LANES * t->lane_step + other * t->other_step,
                   t->out + ((group * blocks + block) * t->taps * t->others + other) * LANES,
                   least(LANES, t->lanes - block * LANES), least(LANES, t->others - other));
    }
}

static void turned(const turn *job, int threads) {
    int64_t items = job->groups * pieces(job->lanes, LANES) * pieces(job->others, LANES);
    et_parallel(turn_filters, job, items, items * LANES * job->taps * LANES * (int64_t)sizeof(float), threads);
}
