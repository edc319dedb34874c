/* The output of a binary convolution: from differences counted to floats and bits, pixel by pixel. */
#ifndef EDGETUNE_BINARY_ANSWER_H
#define EDGETUNE_BINARY_ANSWER_H

#include "binary_places.h"

/* Eight dots: products - 2 * differences. */
static inline v8 dots_of(float products, const uint16_t *sums, const uint32_t *wide) {
    v8 differences = v8_counts(sums);
    if (wide != NULL) {
        float lanes[8];
        for (int k = 0; k < 8; k++) lanes[k] = (float)wide[k];
        differences = v8_add(differences, v8_load(lanes));
    }
    return v8_fma(v8_all(-2), differences, v8_all(products));
}

/* What the filters of a stripe need, filled up to whole vectors. */
typedef struct {
    int64_t first, count;
    uint64_t flips;
    float scale[STRIPE], gain[STRIPE], shift[STRIPE], limits[STRIPE];
} stripe;

/* Dots lie within 2^24, where floats are exact, so limits may be brought there. */
static void read_stripe(const answer *a, int64_t first, int64_t count, stripe *s) {
    const int32_t most = 1 << 24;
    s->first = first;
    s->count = count;
    s->flips = 0;
    for (int64_t k = 0; k < STRIPE; k++) {
        int32_t limit = a->limits && k < count ? a->limits[first + k] : 0;
        s->scale[k] = a->scale && k < count ? a->scale[first + k] : 1;
        s->gain[k] = a->gain && k < count ? a->gain[first + k] : 1;
        s->shift[k] = a->shift && k < count ? a->shift[first + k] : 0;
        s->limits[k] = (float)(limit > most ? most : limit < -most ? -most : limit);
        if (a->flips && k < count && a->flips[first + k]) s->flips |= (uint64_t)1 << k;
    }
}

/* What is asked for, constant where it matters: floats, by a norm, with something added; signs; of whole stripes. */
typedef struct { int floats, normed, added, signs, whole; } wanted;

static inline wanted wanted_of(const answer *a) {
    return (wanted){a->limits == NULL, a->gain != NULL, a->residual != NULL, a->bits != NULL, 0};
}

/* One pixel of the answer. */
static inline __attribute__((always_inline)) void put_pixel(const answer *a, const stripe *s, int64_t pixel,
                                                            float products, const uint16_t *sums, const uint32_t *wide,
                                                            wanted want) {
    v8 low = v8_all(a->low), high = v8_all(a->high);
    uint64_t bits = 0;
    int64_t at = pixel * a->filters + s->first, count = want.whole ? STRIPE : s->count;
    for (int64_t k = 0; k < count; k += 8) {
        int here = want.whole ? 8 : (int)least(8, count - k);
        v8 y = dots_of(products, sums + k, wide ? wide + k : NULL);
        if (want.floats) {
            y = v8_mul(y, v8_load(s->scale + k));
            if (want.normed) y = v8_fma(y, v8_load(s->gain + k), v8_load(s->shift + k));
            if (want.added) y = v8_add(y, load_few(a->residual + at + k, here));
            y = v8_least(high, v8_most(low, y));  /* in this order, a NaN goes through */
            if (a->y != NULL && here == 8) v8_store(a->y + at + k, y);
            else if (a->y != NULL) part_store(a->y + at + k, y, here);
        }
        if (want.signs) bits |= (uint64_t)v8_at_least(y, v8_load(s->limits + k)) << k;
    }
    if (!want.signs) return;
    bits ^= s->flips;
    put_bits(a, pixel, s->first, count == 64 ? bits : bits & (((uint64_t)1 << count) - 1), count);
}

/* A pair of pixels, by the first of them. */
typedef struct { int64_t sample, p, q; } position;

static inline position position_of(const binary_job *j, int64_t pair) {
    int64_t row = pair / j->pairs;
    return (position){row / j->c.p, row % j->c.p, pair % j->pairs * 2};
}

static inline position next_pair(const binary_job *j, position at) {
    at.q += 2;
    if (at.q < j->c.q) return at;
    at.q = 0;
    if (++at.p < j->c.p) return at;
    at.p = 0;
    at.sample++;
    return at;
}

/* The pixels of a tile from `at` on. Of the border's zeros come no products. */
static inline __attribute__((always_inline)) void put_pixels(const binary_job *j, const stripe *s, position at,
                                                             int64_t pairs, const uint16_t *sums, const uint32_t *wide,
                                                             wanted want) {
    const convolution *c = &j->c;
    int64_t all = c->i * c->ku * c->kv, row = -1, of_row = 0;
    for (int64_t n = 0; n < pairs; n++, at = next_pair(j, at)) {
        int64_t pixel = ((j->first_sample + at.sample) * c->p + at.p) * c->q + at.q;
        if (c->pad == 0 && at.p != row) {
            row = at.p;
            of_row = c->i * taps_inside(row * c->stride_h - c->top, c->dil_h, c->ku, c->h);
        }
        for (int second = 0; second < 2 && at.q + second < c->q; second++) {
            int64_t left = (at.q + second) * c->stride_w - c->left, place = (2 * n + second) * STRIPE;
            int64_t products = c->pad ? all : of_row * taps_inside(left, c->dil_w, c->kv, c->w);
            put_pixel(&j->a, s, pixel + second, (float)products, sums + place, wide ? wide + place : NULL, want);
        }
    }
}

static void put_tile(const binary_job *j, position at, int64_t pairs, int64_t first, int64_t count,
                     const uint16_t *sums, const uint32_t *wide) {
    stripe s;
    read_stripe(&j->a, first, count, &s);
    wanted any = wanted_of(&j->a);
    if (wide != NULL || count < STRIPE) put_pixels(j, &s, at, pairs, sums, wide, any);
    else if (!any.floats) put_pixels(j, &s, at, pairs, sums, NULL, (wanted){0, 0, 0, 1, 1});
    else if (!any.normed) put_pixels(j, &s, at, pairs, sums, NULL, (wanted){1, 0, any.added, any.signs, 1});
    else if (!any.added) put_pixels(j, &s, at, pairs, sums, NULL, (wanted){1, 1, 0, any.signs, 1});
    else if (!any.signs) put_pixels(j, &s, at, pairs, sums, NULL, (wanted){1, 1, 1, 0, 1});
    else put_pixels(j, &s, at, pairs, sums, NULL, (wanted){1, 1, 1, 1, 1});
}

#endif
