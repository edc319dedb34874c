/* Convolutions with one bit a weight whose groups have one channel and one filter, which lie side by side in the words
 * of a pixel: a word of filters, (u v word), has one tap of 64 of them. No input is made ready: taps beyond the border
 * are left out, or meet its value. */
#ifndef EDGETUNE_DEPTHWISE_H
#define EDGETUNE_DEPTHWISE_H

#include "binary.h"

enum {
    MOST_TAPS = 64, PLANES = 7,  /* bits of a count */
    WORDS = 4, WIDE = 64 * WORDS /* channels at a time */
};

typedef uint64_t wide __attribute__((vector_size(8 * WORDS)));

static inline int is_depthwise(const convolution *c) { return c->i == 1 && c->o == 1 && c->ku * c->kv <= MOST_TAPS; }

/* Up to WORDS words from `at` on, the others 0. */
static inline void read_wide(const uint64_t *at, int64_t count, wide *to) {
    if (count == WORDS) memcpy(to, at, sizeof *to);
    else for (int64_t k = 0; k < WORDS; k++) (*to)[k] = k < count ? at[k] : 0;
}

/* The input row that a tap of an output row meets, or -1; the same for columns. */
static inline int64_t met(int64_t out, int64_t stride, int64_t before, int64_t tap, int64_t dil, int64_t size) {
    int64_t at = out * stride - before + tap * dil;
    return at < 0 || at >= size ? -1 : at;
}

/* Where the differences of an output pixel are counted: `count` words of channels from `word` on, met by the words of
 * filters `w`, a tap each. */
typedef struct {
    const uint64_t *bits;
    const wide *w;
    int64_t word, count;
} channels;

/* Bit k of plane b becomes bit b of what channel k differs in; returns how many taps there are. */
static inline __attribute__((always_inline)) int64_t count_planes(const convolution *c, const channels *at,
                                                                  int64_t row, int64_t q, int planes, wide *plane) {
    int64_t taps = 0, words = parts(c->groups, 64), sample = row / c->p, p = row % c->p;
    wide border = {0}, more, carry;
    if (c->pad > 0) border = ~border;
    for (int b = 0; b < planes; b++) plane[b] = (wide){0};
    for (int64_t u = 0; u < c->ku; u++) {
        int64_t y = met(p, c->stride_h, c->top, u, c->dil_h, c->h);
        for (int64_t v = 0; v < c->kv; v++) {
            int64_t x = met(q, c->stride_w, c->left, v, c->dil_w, c->w);
            int inside = y >= 0 && x >= 0;
            if (!inside && c->pad == 0) continue;
            if (inside) read_wide(at->bits + ((sample * c->h + y) * c->w + x) * words + at->word, at->count, &more);
            else more = border;
            more ^= at->w[u * c->kv + v];
            for (int b = 0; b < planes; b++) {
                carry = plane[b] & more;
                plane[b] ^= more;
                more = carry;
            }
            taps++;
        }
    }
    return taps;
}

/* The counts of 64 channels, from word k of the planes. */
static inline void counts_of(const wide *plane, int k, int planes, uint16_t counts[64]) {
    uint8_t bytes[64];
    for (int half = 0; half < 2; half++) {
        b32 sum = b32_zero();
        for (int b = 0; b < planes; b++) sum = b32_add(sum, b32_where((uint32_t)(plane[b][k] >> 32 * half), 1 << b));
        b32_store(bytes + 32 * half, sum);
    }
    for (int i = 0; i < 64; i++) counts[i] = bytes[i];
}

/* Sums of bytes with weights of 16 bits, 1 or -1, at one output pixel of `count` channels from `first` on. */
static inline void byte_sums_of(const convolution *c, const uint8_t *x, const int16_t w[MOST_TAPS][STRIPE],
                                int64_t row, int64_t q, int64_t first, int64_t count, int32_t sums[STRIPE]) {
    int16_t acc[STRIPE] = {0};
    uint8_t border[STRIPE];
    memset(border, (int)c->pad, sizeof border);
    int64_t sample = row / c->p, p = row % c->p;
    for (int64_t u = 0; u < c->ku; u++) {
        int64_t y = met(p, c->stride_h, c->top, u, c->dil_h, c->h);
        for (int64_t v = 0; v < c->kv; v++) {
            int64_t z = met(q, c->stride_w, c->left, v, c->dil_w, c->w);
            const uint8_t *from = border;
            if (y >= 0 && z >= 0) from = x + ((sample * c->h + y) * c->w + z) * c->groups + first;
            const int16_t *weights = w[u * c->kv + v];
            if (count == STRIPE)
                for (int k = 0; k < STRIPE; k++) acc[k] = (int16_t)(acc[k] + from[k] * weights[k]);
            else
                for (int64_t k = 0; k < count; k++) acc[k] = (int16_t)(acc[k] + from[k] * weights[k]);
        }
    }
    for (int k = 0; k < STRIPE; k++) sums[k] = acc[k];
}

#endif
