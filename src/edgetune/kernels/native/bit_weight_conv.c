/* Convolutions of bytes with +-1: x (n h w c) uint8 with filters, as binary.h lays them out -> int32 or float32.
 *
 * First the input is copied with its padding, channels filled up to whole bytes of bits; then items of a few pixels and
 * one block of filters are computed, a few channels of all pixels at a time, whose weights become bytes +1 and -1. */
#include "depthwise.h"

enum {
    PIXELS = 64,          /* of an item at most */
    DEPTH = 32,           /* bytes of bits: 64 times two products in 16 bits */
    QUADS = 2 * DEPTH     /* channels meet by fours */
};

typedef struct {
    convolution c;
    answer a;
    const uint8_t *x, *filters;
    int32_t *sums;
    uint8_t *padded;  /* (sample row group column channel) */
    int64_t rows, columns, depth;  /* depth: channels of a group, filled up */
    int64_t first_sample, samples, tile, blocks;
} byte_job;

static inline int64_t padded_row(const byte_job *j) { return j->c.groups * j->columns * j->depth; }

/* Items are padded rows of the samples at hand. */
static void pad_rows(const void *job, int64_t begin, int64_t end) {
    const byte_job *j = job;
    const convolution *c = &j->c;
    for (int64_t item = begin; item < end; item++) {
        int64_t row = item % j->rows, from = row - c->top, channels = c->groups * c->i;
        if (!row_is_met(c, row)) continue;
        const uint8_t *pixels = j->x + ((j->first_sample + item / j->rows) * c->h + from) * c->w * channels;
        uint8_t *to = j->padded + item * padded_row(j);
        for (int64_t group = 0; group < c->groups; group++)
            for (int64_t x = 0; x < j->columns; x++, to += j->depth) {
                int64_t column = x - c->left;
                if (from >= 0 && from < c->h && column >= 0 && column < c->w)
                    memcpy(to, pixels + column * channels + group * c->i, (size_t)c->i);
                else
                    memset(to, (int)c->pad, (size_t)c->i);
                memset(to + c->i, 0, (size_t)(j->depth - c->i));
            }
    }
}

/* The eight weights of every byte. */
static uint8_t weights_of[256][8];

__attribute__((constructor)) static void fill_weights(void) {
    for (int byte = 0; byte < 256; byte++)
        for (int k = 0; k < 8; k++) weights_of[byte][k] = byte >> k & 1 ? 1 : 0xff;
}

/* (byte LANES) -> (quad filter 4). */
static void spread_weights(const uint8_t *from, int64_t bytes, int8_t *to) {
    for (int64_t k = 0; k < bytes; k++)
        for (int f = 0; f < LANES; f++) {
            const uint8_t *eight = weights_of[from[k * LANES + lane_of(f)]];
            memcpy(to + (2 * k * LANES + f) * 4, eight, 4);
            memcpy(to + ((2 * k + 1) * LANES + f) * 4, eight + 4, 4);
        }
}

/* `quads` of fours of channels of one or two pixels, added to sums (pixel LANES). */
static inline __attribute__((always_inline)) void meet_bytes(const uint8_t *const *at, int pixels, const int8_t *w,
                                                             int64_t quads, int32_t *sums) {
#if defined(__AVX2__) && !defined(ET_PLAIN)
    __m256i acc[2][4];
    for (int n = 0; n < 2; n++)
        for (int v = 0; v < 4; v++) acc[n][v] = _mm256_setzero_si256();
    const uint8_t *one = at[0], *two = at[pixels - 1];
    for (int64_t k = 0; k < quads; k++)
        for (int n = 0; n < pixels; n++) {
            int32_t four;
            memcpy(&four, (n ? two : one) + 4 * k, sizeof four);
            __m256i values = _mm256_set1_epi32(four);
            for (int v = 0; v < 4; v++) {
                __m256i weights = _mm256_loadu_si256((const __m256i *)(const void *)(w + (k * LANES + 8 * v) * 4));
                acc[n][v] = _mm256_add_epi16(acc[n][v], _mm256_maddubs_epi16(values, weights));
            }
        }
    for (int n = 0; n < pixels; n++)
        for (int v = 0; v < 4; v++) {
            __m256i *place = (__m256i *)(void *)(sums + n * LANES + 8 * v);
            __m256i more = _mm256_madd_epi16(acc[n][v], _mm256_set1_epi16(1));
            _mm256_storeu_si256(place, _mm256_add_epi32(_mm256_loadu_si256(place), more));
        }
#else
    for (int n = 0; n < pixels; n++)
        for (int64_t k = 0; k < quads; k++) {
            const uint8_t *a = at[n] + 4 * k;
            const int8_t *row = w + k * LANES * 4;
            for (int f = 0; f < LANES; f++)
                sums[n * LANES + f] += a[0] * row[4 * f] + a[1] * row[4 * f + 1] + a[2] * row[4 * f + 2]
                    + a[3] * row[4 * f + 3];
        }
#endif
}

/* The sums of an item: (pixel LANES). */
static void sum_tile(const byte_job *j, const int64_t *offsets, int64_t pixels, const uint8_t *filters, int32_t *sums) {
    const convolution *c = &j->c;
    int runs = c->dil_w == 1 ? 1 : (int)c->kv;
    int64_t run = c->dil_w == 1 ? c->kv * c->bytes : c->bytes;
    _Alignas(32) int8_t w[QUADS * LANES * 4];
    memset(sums, 0, (size_t)(pixels * LANES) * sizeof *sums);
    for (int64_t u = 0; u < c->ku; u++)
        for (int64_t v = 0; v < runs; v++)
            for (int64_t k = 0; k < run; k += DEPTH) {
                int64_t bytes = least(DEPTH, run - k), n = 0;
                const uint8_t *start = j->padded + u * c->dil_h * padded_row(j) + v * c->dil_w * j->depth + 8 * k;
                spread_weights(filters + ((u * runs + v) * run + k) * LANES, bytes, w);
                for (; n + 2 <= pixels; n += 2) {
                    const uint8_t *at[2] = {start + offsets[n], start + offsets[n + 1]};
                    meet_bytes(at, 2, w, 2 * bytes, sums + n * LANES);
                }
                for (; n < pixels; n++) {
                    const uint8_t *at[1] = {start + offsets[n]};
                    meet_bytes(at, 1, w, 2 * bytes, sums + n * LANES);
                }
            }
}

static inline v8 whole_floats(const int32_t *p) {
    float lanes[8];
    for (int k = 0; k < 8; k++) lanes[k] = (float)p[k];
    return v8_load(lanes);
}

/* One pixel of the answer, `count` filters from `first` on. */
static inline void put_sums(const byte_job *j, int64_t pixel, int64_t first, int64_t count, const int32_t *sums) {
    int64_t at = pixel * j->a.filters + first;
    if (j->sums != NULL) {
        memcpy(j->sums + at, sums, (size_t)count * sizeof *sums);
        return;
    }
    for (int64_t k = 0; k < count; k += 8)
        part_store(j->a.y + at + k, affine(&j->a, whole_floats(sums + k), first + k, at + k, count - k),
                   (int)least(8, count - k));
}

/* Items are (tile of pixels, group, block of filters). */
static void byte_items(const void *job, int64_t begin, int64_t end) {
    const byte_job *j = job;
    const convolution *c = &j->c;
    int32_t sums[PIXELS * LANES];
    for (int64_t item = begin; item < end; item++) {
        int64_t block = item % j->blocks, group = item / j->blocks % c->groups;
        int64_t first_pixel = item / j->blocks / c->groups * j->tile;
        int64_t pixels = least(j->tile, j->samples * c->p * c->q - first_pixel), offsets[PIXELS];
        int64_t count = least(LANES, c->o - block * LANES), first = group * c->o + block * LANES;
        for (int64_t n = 0; n < pixels; n++) {
            int64_t row = (first_pixel + n) / c->q, q = (first_pixel + n) % c->q;
            offsets[n] = (row / c->p * j->rows + row % c->p * c->stride_h) * padded_row(j)
                + (group * j->columns + q * c->stride_w) * j->depth;
        }
        sum_tile(j, offsets, pixels, j->filters + (group * j->blocks + block) * block_bytes(c), sums);
        int64_t first_out = j->first_sample * c->p * c->q + first_pixel;
        for (int64_t n = 0; n < pixels; n++) put_sums(j, first_out + n, first, count, sums + n * LANES);
    }
}

/* Items are (stripe of channels, sample, row). */
static void depthwise_bytes(const void *job, int64_t begin, int64_t end) {
    const byte_job *j = job;
    const convolution *c = &j->c;
    int64_t rows = c->n * c->p, words = parts(c->groups, 64), stripe = -1;
    int16_t w[MOST_TAPS][STRIPE];
    int32_t sums[STRIPE];
    for (int64_t item = begin; item < end; item++) {
        int64_t row = item % rows, first = item / rows * STRIPE, count = least(STRIPE, c->groups - first);
        if (item / rows != stripe) {
            stripe = item / rows;
            for (int64_t t = 0; t < c->ku * c->kv; t++)
                for (int64_t k = 0; k < STRIPE; k++)
                    w[t][k] = ((const uint64_t *)(const void *)j->filters)[t * words + stripe] >> k & 1 ? 1 : -1;
        }
        for (int64_t q = 0; q < c->q; q++) {
            byte_sums_of(c, j->x, (const int16_t (*)[STRIPE])w, row, q, first, count, sums);
            put_sums(j, row * c->q + q, first, count, sums);
        }
    }
}

/* sizes: as convolution_of reads them, then samples at a time. scratch: so many padded samples. One of y and whole. */
void et_bit_weight_conv_f32(const uint8_t *x, const uint8_t *filters, const float *scale, const float *shift,
                            const float *residual, float *y, int32_t *whole, uint8_t *scratch, const int64_t *sizes,
                            int threads) {
    enum { MACS_PER_BYTE = 16 };  /* what is worth a thread is told in bytes */
    byte_job j = {.c = convolution_of(sizes), .x = x, .filters = filters, .sums = whole, .padded = scratch};
    const convolution *c = &j.c;
    int64_t at_once = sizes[19];
    j.a = (answer){.scale = scale, .shift = shift, .residual = residual, .y = y, .filters = c->o * c->groups};
    if (is_depthwise(c)) {
        et_parallel(depthwise_bytes, &j, c->n * c->p * parts(c->groups, STRIPE),
                    c->n * c->p * c->q * c->groups * c->ku * c->kv, threads);
        return;
    }
    j.depth = 8 * c->bytes;
    j.rows = (c->p - 1) * c->stride_h + (c->ku - 1) * c->dil_h + 1;
    j.columns = (c->q - 1) * c->stride_w + (c->kv - 1) * c->dil_w + 1;
    j.blocks = parts(c->o, LANES);
    for (; j.first_sample < c->n; j.first_sample += at_once) {
        j.samples = least(at_once, c->n - j.first_sample);
        int64_t rows = j.samples * j.rows, all = j.samples * c->p * c->q;
        j.tile = parts(all, parts(all, PIXELS));
        et_parallel(pad_rows, &j, rows, rows * padded_row(&j), threads);
        et_parallel_each(byte_items, &j, parts(all, j.tile) * c->groups * j.blocks,
                         all * j.a.filters * c->i * c->ku * c->kv / MACS_PER_BYTE, threads);
    }
}
