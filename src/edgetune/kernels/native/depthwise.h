/* Convolutions with one bit a weight whose groups have one channel and one filter: 64 groups side by side in the lanes,
 * tap by tap. No input is made ready: taps beyond the border are left out, or meet a row of its value. */
#ifndef EDGETUNE_DEPTHWISE_H
#define EDGETUNE_DEPTHWISE_H

#include "binary.h"

enum { MOST_TAPS = 64 };

static inline int is_depthwise(const convolution *c) { return c->i == 1 && c->o == 1 && c->ku * c->kv <= MOST_TAPS; }

/* Whether the one filter of a group has +1 at a tap. */
static inline int tap_of(const convolution *c, const uint8_t *filters, int64_t group, int64_t tap) {
    return filters[group * block_bytes(c) + tap * LANES] & 1;
}

/* The input pixel that a tap of an output pixel meets, or -1. */
static inline int64_t met_pixel(const convolution *c, int64_t sample, int64_t p, int64_t q, int64_t u, int64_t v) {
    int64_t row = p * c->stride_h - c->top + u * c->dil_h, column = q * c->stride_w - c->left + v * c->dil_w;
    if (row < 0 || row >= c->h || column < 0 || column >= c->w) return -1;
    return (sample * c->h + row) * c->w + column;
}

/* Differences at one output pixel of `count` groups from `first` on; returns how many taps it has. */
static inline int64_t differences_of(const convolution *c, const uint64_t *bits, const uint64_t w[MOST_TAPS][STRIPE],
                                     int64_t sample, int64_t p, int64_t q, int64_t first, int64_t count,
                                     uint16_t sums[STRIPE]) {
    static const uint64_t zeros[STRIPE];
    uint64_t ones[STRIPE], acc[STRIPE] = {0};
    int64_t taps = 0;
    for (int k = 0; k < STRIPE; k++) ones[k] = 1;
    for (int64_t u = 0; u < c->ku; u++)
        for (int64_t v = 0; v < c->kv; v++) {
            int64_t pixel = met_pixel(c, sample, p, q, u, v);
            if (pixel < 0 && c->pad == 0) continue;
            const uint64_t *x = pixel < 0 ? (c->pad > 0 ? ones : zeros) : bits + pixel * c->groups + first;
            const uint64_t *row = w[u * c->kv + v];
            taps++;
            if (count == STRIPE)
                for (int k = 0; k < STRIPE; k++) acc[k] += x[k] ^ row[k];
            else
                for (int64_t k = 0; k < count; k++) acc[k] += x[k] ^ row[k];
        }
    for (int k = 0; k < STRIPE; k++) sums[k] = (uint16_t)acc[k];
    return taps;
}

/* The same with bytes: the sums themselves, which fit 16 bits. */
static inline void byte_sums_of(const convolution *c, const uint8_t *x, const int16_t w[MOST_TAPS][STRIPE],
                                int64_t sample, int64_t p, int64_t q, int64_t first, int64_t count,
                                int32_t sums[STRIPE]) {
    int16_t acc[STRIPE] = {0};
    uint8_t border[STRIPE];
    memset(border, (int)c->pad, sizeof border);
    for (int64_t u = 0; u < c->ku; u++)
        for (int64_t v = 0; v < c->kv; v++) {
            int64_t pixel = met_pixel(c, sample, p, q, u, v);
            const uint8_t *from = pixel < 0 ? border : x + pixel * c->groups + first;
            const int16_t *row = w[u * c->kv + v];
            if (count == STRIPE)
                for (int k = 0; k < STRIPE; k++) acc[k] = (int16_t)(acc[k] + from[k] * row[k]);
            else
                for (int64_t k = 0; k < count; k++) acc[k] = (int16_t)(acc[k] + from[k] * row[k]);
        }
    for (int k = 0; k < STRIPE; k++) sums[k] = acc[k];
}

#endif
