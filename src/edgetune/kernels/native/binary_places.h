/* The input of a binary convolution: which table every 4 bits of a pixel, and of the one a stride further on, need. */
#ifndef EDGETUNE_BINARY_PLACES_H
#define EDGETUNE_BINARY_PLACES_H

#include "binary.h"

enum {
    NOTHING = 16, SYMBOLS = 17,  /* 4 bits, or a zero of the padding */
    PAIRS = 64,                  /* of pixels, in an item at most */
    CHUNK = 30,                  /* bytes of channels: 20 times three look-ups, whose counts fit a byte */
    MOST_COUNT = 65535
};

_Alignas(64) static uint8_t tables[SYMBOLS * SYMBOLS][16];

__attribute__((constructor)) static void fill_tables(void) {
    for (int second = 0; second < SYMBOLS; second++)
        for (int first = 0; first < SYMBOLS; first++)
            for (int w = 0; w < 16; w++) {
                int low = first == NOTHING ? 0 : __builtin_popcount((unsigned)(first ^ w));
                int high = second == NOTHING ? 0 : __builtin_popcount((unsigned)(second ^ w));
                tables[second * SYMBOLS + first][w] = (uint8_t)(low | high << 4);
            }
}

typedef struct {
    convolution c;
    answer a;
    const uint8_t *bits, *filters;
    uint16_t *places;  /* (sample row group column nibble): bytes from the first table on */
    uint8_t *symbols;  /* the same, with a stride more columns */
    int64_t rows, columns, nibbles, pixel_bytes;
    int64_t first_sample, samples;
    int64_t pairs, tile, stripes;
} binary_job;

static inline int64_t row_places(const binary_job *j) { return j->c.groups * j->columns * j->nibbles; }
static inline int64_t group_symbols(const binary_job *j) { return (j->columns + j->c.stride_w) * j->nibbles; }

/* The symbols of `columns` columns of the padding. */
static void pad_symbols(const binary_job *j, int64_t columns, uint8_t *to) {
    if (j->c.pad <= 0) {
        memset(to, j->c.pad < 0 ? 0 : NOTHING, (size_t)(columns * j->nibbles));
        return;
    }
    for (int64_t x = 0; x < columns; x++)
        for (int64_t k = 0; k < j->nibbles; k++) {
            int64_t real = j->c.i - 4 * k;
            *to++ = real >= 4 ? 15 : real > 0 ? (uint8_t)((1 << real) - 1) : 0;
        }
}

static inline void split_bytes(const uint8_t *restrict bytes, int64_t count, uint8_t *restrict to) {
    for (int64_t k = 0; k < count; k++) {
        to[2 * k] = bytes[k] & 15;
        to[2 * k + 1] = bytes[k] >> 4;
    }
}

/* The symbols of one pixel's channels from `first` on, which begin anywhere in a byte. */
static inline void split_bits(const binary_job *j, const uint8_t *pixel, int64_t first, uint8_t *to) {
    for (int64_t k = 0; k < j->nibbles; k++) {
        int64_t at = first + 4 * k, real = least(4, j->c.i - 4 * k), shift = at % 8;
        unsigned both = real > 0 ? pixel[at / 8] >> shift : 0;
        if (shift + real > 8) both |= (unsigned)pixel[at / 8 + 1] << (8 - shift);
        to[k] = real > 0 ? (uint8_t)(both & ((1u << real) - 1)) : 0;
    }
}

/* The symbols of one group of a padded row of the input; NULL for a row of the padding. */
static void read_symbols(const binary_job *j, const uint8_t *row, int64_t group, uint8_t *to) {
    const convolution *c = &j->c;
    int64_t all = j->columns + c->stride_w, left = row ? least(c->left, all) : all, real = least(c->w, all - left);
    pad_symbols(j, left, to);
    if (row == NULL) return;
    to += left * j->nibbles;
    int64_t first = group * c->i, whole = c->groups == 1 || c->i % 8 == 0;
    if (c->bytes == j->pixel_bytes) split_bytes(row, real * c->bytes, to);
    else if (whole)
        for (int64_t x = 0; x < real; x++)
            split_bytes(row + x * j->pixel_bytes + first / 8, c->bytes, to + x * j->nibbles);
    else for (int64_t x = 0; x < real; x++) split_bits(j, row + x * j->pixel_bytes, first, to + x * j->nibbles);
    pad_symbols(j, all - left - real, to + real * j->nibbles);
}

/* The place of the table of every symbol and the one `apart` from it. */
static inline void pair_symbols(const uint8_t *symbols, int64_t apart, int64_t count, uint16_t *restrict to) {
    for (int64_t k = 0; k < count; k++) to[k] = (uint16_t)((symbols[k] + SYMBOLS * symbols[k + apart]) * 16);
}

/* Items are padded rows of the samples at hand. */
static void find_places(const void *job, int64_t begin, int64_t end) {
    const binary_job *j = job;
    const convolution *c = &j->c;
    for (int64_t item = begin; item < end; item++) {
        int64_t row = item % j->rows, from = row - c->top;
        if (!row_is_met(c, row)) continue;
        const uint8_t *pixels = from < 0 || from >= c->h ? NULL
            : j->bits + ((j->first_sample + item / j->rows) * c->h + from) * c->w * j->pixel_bytes;
        for (int64_t group = 0; group < c->groups; group++) {
            uint8_t *symbols = j->symbols + (item * c->groups + group) * group_symbols(j);
            uint16_t *to = j->places + item * row_places(j) + group * j->columns * j->nibbles;
            read_symbols(j, pixels, group, symbols);
            pair_symbols(symbols, c->stride_w * j->nibbles, j->columns * j->nibbles, to);
        }
    }
}

#endif
