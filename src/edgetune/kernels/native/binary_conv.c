/* Convolutions of +-1 with +-1: bits (n h w words) with filters, as binary.h lays them out -> floats, bits or both.
 *
 * What differs between 4 channels of a pixel and of a filter is looked up: a table of 16 bytes for the pixel's 4 bits,
 * indexed by those of 32 filters at once. An entry holds the count of two output pixels side by side, 4 bits each, so
 * that one look-up is 256 multiply-accumulates; three of them are added before the halves would overflow. Zeros of the
 * padding have a table of their own that counts nothing: with as many products as there are real taps, dot = products
 * - 2 * differences is exact at the border as well.
 *
 * First every 4 bits of a pixel and of the one a stride further on become the place of their table, then items of a
 * few pairs of pixels and 64 filters are computed, a few channels of all pairs at a time. */
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

/* The symbols of one group of a padded row of the input; NULL for a row of the padding. */
static void read_symbols(const binary_job *j, const uint8_t *row, int64_t group, uint8_t *to) {
    const convolution *c = &j->c;
    int64_t all = j->columns + c->stride_w, left = row ? least(c->left, all) : all, real = least(c->w, all - left);
    pad_symbols(j, left, to);
    if (row == NULL) return;
    to += left * j->nibbles;
    row += group * ((c->i + 63) / 64 * 8);
    if (c->bytes == j->pixel_bytes) split_bytes(row, real * c->bytes, to);
    else for (int64_t x = 0; x < real; x++) split_bytes(row + x * j->pixel_bytes, c->bytes, to + x * j->nibbles);
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

/* Bytes of filters as nibbles, each in a byte: (byte LANES) of one or two blocks -> (nibble block LANES). */
static inline void part_nibbles(const uint8_t *from, int64_t block, int64_t bytes, int blocks, uint8_t *to) {
    for (int64_t k = 0; k < bytes; k++)
        for (int v = 0; v < blocks; v++) {
            b32 both = b32_load(from + v * block + k * LANES);
            b32_store(to + (2 * k * blocks + v) * LANES, b32_low_nibbles(both));
            b32_store(to + ((2 * k + 1) * blocks + v) * LANES, b32_high_nibbles(both));
        }
}

/* Sums of three look-ups, split: of the first pixels the counts themselves (bytes); of the second ones, 16 bits hold
 * F1 + 16 F2 + 256 F3, where F2 is a count of the first pixels. */
typedef struct { b32 first, mixed; } counts;

static inline counts count_more(counts c, b32 sum) {
    return (counts){b32_add(c.first, b32_low_nibbles(sum)), w16_add(c.mixed, w16_right4(sum))};
}

/* Counts of a pair of pixels to the sums (pixel filter) of 16 bits. */
static inline void add_up(counts c, uint16_t *to, int stride, int begin) {
    b32 second = w16_sub(c.mixed, w16_times16(w16_high(c.first)));
    b32 sums[4] = {w16_low(c.first), w16_high(c.first), w16_low(second), w16_high(second)};
    for (int k = 0; k < 4; k++) {
        uint16_t *place = to + k / 2 * stride + k % 2 * (LANES / 2);
        b32_store(place, begin ? sums[k] : w16_add(sums[k], b32_load(place)));
    }
}

static inline table16 table_of(uint16_t place) { return table_at((const uint8_t *)tables + place); }

/* `nibbles` of one or two pairs of pixels with those of one or two blocks of filters. */
static inline __attribute__((always_inline)) void meet_pairs(const uint16_t *const *at, int pairs, const uint8_t *w,
                                                             int blocks, int64_t nibbles, uint16_t *sums, int begin) {
    counts c[2][2];
    for (int n = 0; n < 2; n++)
        for (int v = 0; v < 2; v++) c[n][v] = (counts){b32_zero(), b32_zero()};
    const uint16_t *one = at[0], *two = at[pairs - 1];
    int64_t k = 0;
    for (; k + 3 <= nibbles; k += 3)
        for (int n = 0; n < pairs; n++) {
            b32 sum[2];
            for (int step = 0; step < 3; step++) {
                table16 table = table_of((n ? two : one)[k + step]);
                for (int v = 0; v < blocks; v++) {
                    b32 found = b32_lookup(table, b32_load(w + ((k + step) * blocks + v) * LANES));
                    sum[v] = step ? b32_add(sum[v], found) : found;
                }
            }
            for (int v = 0; v < blocks; v++) c[n][v] = count_more(c[n][v], sum[v]);
        }
    for (; k < nibbles; k++)
        for (int n = 0; n < pairs; n++) {
            table16 table = table_of((n ? two : one)[k]);
            for (int v = 0; v < blocks; v++)
                c[n][v] = count_more(c[n][v], b32_lookup(table, b32_load(w + (k * blocks + v) * LANES)));
        }
    for (int n = 0; n < pairs; n++)
        for (int v = 0; v < blocks; v++) add_up(c[n][v], sums + n * 2 * STRIPE + v * LANES, STRIPE, begin);
}

/* All pairs of an item, `nibbles` of each from `start` on. */
static inline __attribute__((always_inline)) void meet_all(const uint16_t *start, const int64_t *offsets, int64_t pairs,
                                                           const uint8_t *w, int blocks, int64_t nibbles,
                                                           uint16_t *sums, int begin) {
    int64_t n = 0;
    for (; n + 2 <= pairs; n += 2) {
        const uint16_t *at[2] = {start + offsets[n], start + offsets[n + 1]};
        meet_pairs(at, 2, w, blocks, nibbles, sums + n * 2 * STRIPE, begin);
    }
    for (; n < pairs; n++) {
        const uint16_t *at[1] = {start + offsets[n]};
        meet_pairs(at, 1, w, blocks, nibbles, sums + n * 2 * STRIPE, begin);
    }
}

/* Sums that would outgrow 16 bits go to 32. */
static void widen(const uint16_t *sums, uint32_t *wide, int64_t count, int begin) {
    for (int64_t k = 0; k < count; k++) wide[k] = (begin ? 0 : wide[k]) + sums[k];
}

/* The differences of all pairs: sums (pair pixel STRIPE); returns whether some of them are in `wide` as well. */
static int count_differences(const binary_job *j, const int64_t *offsets, int64_t pairs, const uint8_t *filters,
                             int blocks, uint16_t *sums, uint32_t *wide) {
    const convolution *c = &j->c;
    int runs = c->dil_w == 1 ? 1 : (int)c->kv, begin = 1, is_wide = 0;
    int64_t run = c->dil_w == 1 ? c->kv * c->bytes : c->bytes, held = 0;
    _Alignas(64) uint8_t w[2 * CHUNK * STRIPE];
    for (int64_t u = 0; u < c->ku; u++)
        for (int64_t v = 0; v < runs; v++)
            for (int64_t k = 0; k < run; k += CHUNK) {
                int64_t bytes = least(CHUNK, run - k);
                const uint16_t *start = j->places + u * c->dil_h * row_places(j) + v * c->dil_w * j->nibbles + 2 * k;
                if (held + 8 * bytes > MOST_COUNT) {
                    widen(sums, wide, pairs * 2 * STRIPE, !is_wide);
                    begin = is_wide = 1;
                    held = 0;
                }
                part_nibbles(filters + ((u * runs + v) * run + k) * LANES, block_bytes(c), bytes, blocks, w);
                if (blocks == 2 && begin) meet_all(start, offsets, pairs, w, 2, 2 * bytes, sums, 1);
                else if (blocks == 2) meet_all(start, offsets, pairs, w, 2, 2 * bytes, sums, 0);
                else meet_all(start, offsets, pairs, w, 1, 2 * bytes, sums, begin);
                held += 8 * bytes;
                begin = 0;
            }
    return is_wide;
}

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
    float scale[STRIPE], shift[STRIPE], limits[STRIPE];
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
        s->shift[k] = a->shift && k < count ? a->shift[first + k] : 0;
        s->limits[k] = (float)(limit > most ? most : limit < -most ? -most : limit);
        if (a->flips && k < count && a->flips[first + k]) s->flips |= (uint64_t)1 << k;
    }
}

/* One pixel of the answer. What is asked for is constant: floats or not, of whole stripes or not, bits or not. */
static inline __attribute__((always_inline)) void put_pixel(const answer *a, const stripe *s, int64_t pixel,
                                                            float products, const uint16_t *sums, const uint32_t *wide,
                                                            int floats, int whole, int signs) {
    uint64_t bits = 0;
    int64_t at = pixel * a->filters + s->first, count = whole ? STRIPE : s->count;
    for (int64_t k = 0; k < count; k += 8) {
        int here = whole ? 8 : (int)least(8, count - k);
        v8 y = dots_of(products, sums + k, wide ? wide + k : NULL);
        if (floats) {
            y = v8_fma(y, v8_load(s->scale + k), v8_load(s->shift + k));
            if (a->residual) y = v8_add(y, load_few(a->residual + at + k, here));
            if (here == 8) v8_store(a->y + at + k, y);
            else part_store(a->y + at + k, y, here);
        }
        if (signs) bits |= (uint64_t)v8_at_least(y, v8_load(s->limits + k)) << k;
    }
    if (!signs) return;
    bits ^= s->flips;
    put_bits(a, pixel, s->first, count == 64 ? bits : bits & (((uint64_t)1 << count) - 1), count);
}

static inline void put_any(const answer *a, const stripe *s, int64_t pixel, float products, const uint16_t *sums,
                           const uint32_t *wide) {
    int whole = s->count == STRIPE;
    if (wide != NULL || !whole) put_pixel(a, s, pixel, products, sums, wide, a->y != NULL, 0, a->bits != NULL);
    else if (a->bits == NULL) put_pixel(a, s, pixel, products, sums, NULL, 1, 1, 0);
    else if (a->y == NULL) put_pixel(a, s, pixel, products, sums, NULL, 0, 1, 1);
    else put_pixel(a, s, pixel, products, sums, NULL, 1, 1, 1);
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

/* Products of one output: of the border's zeros none. */
static inline int64_t products_of(const convolution *c, int64_t p, int64_t q) {
    if (c->pad != 0) return c->i * c->ku * c->kv;
    return c->i * taps_inside(p * c->stride_h - c->top, c->dil_h, c->ku, c->h)
        * taps_inside(q * c->stride_w - c->left, c->dil_w, c->kv, c->w);
}

static void put_tile(const binary_job *j, position at, int64_t pairs, int64_t first, int64_t count,
                     const uint16_t *sums, const uint32_t *wide) {
    const convolution *c = &j->c;
    stripe s;
    read_stripe(&j->a, first, count, &s);
    for (int64_t n = 0; n < pairs; n++, at = next_pair(j, at)) {
        int64_t pixel = ((j->first_sample + at.sample) * c->p + at.p) * c->q + at.q;
        for (int second = 0; second < 2 && at.q + second < c->q; second++) {
            int64_t place = (2 * n + second) * STRIPE;
            put_any(&j->a, &s, pixel + second, (float)products_of(c, at.p, at.q + second), sums + place,
                    wide ? wide + place : NULL);
        }
    }
}

/* Items are (tile of pairs, group, stripe of filters). */
static void binary_items(const void *job, int64_t begin, int64_t end) {
    const binary_job *j = job;
    const convolution *c = &j->c;
    _Alignas(32) uint16_t sums[PAIRS * 2 * STRIPE];
    uint32_t wide[PAIRS * 2 * STRIPE];
    for (int64_t item = begin; item < end; item++) {
        int64_t stripe = item % j->stripes, group = item / j->stripes % c->groups;
        int64_t first_pair = item / j->stripes / c->groups * j->tile;
        int64_t pairs = least(j->tile, j->samples * c->p * j->pairs - first_pair);
        int64_t count = least(STRIPE, c->o - stripe * STRIPE), offsets[PAIRS];
        position first = position_of(j, first_pair), at = first;
        for (int64_t n = 0; n < pairs; n++, at = next_pair(j, at))
            offsets[n] = (at.sample * j->rows + at.p * c->stride_h) * row_places(j)
                + (group * j->columns + at.q * c->stride_w) * j->nibbles;
        int is_wide = count_differences(j, offsets, pairs, blocks_of(c, j->filters, group, stripe),
                                        count > LANES ? 2 : 1, sums, wide);
        put_tile(j, first, pairs, group * c->o + stripe * STRIPE, count, sums, is_wide ? wide : NULL);
    }
}

/* sizes: as convolution_of reads them, then channels of a group of the bits that come out, and samples at a time.
 * scratch: 3 bytes a nibble of so many padded samples, the places of two bytes first. y, out or both are wanted. */
void et_binary_conv_f32(const uint8_t *bits, const uint8_t *filters, const float *scale, const float *shift,
                        const float *residual, const int32_t *limits, const uint8_t *flips, float *y, uint64_t *out,
                        void *scratch, const int64_t *sizes, int threads) {
    enum { MACS_PER_BYTE = 64 };  /* what is worth a thread is told in bytes */
    binary_job j = {.c = convolution_of(sizes), .bits = bits, .filters = filters};
    const convolution *c = &j.c;
    int64_t filters_in_all = c->o * c->groups, per_group = sizes[19], at_once = sizes[20];
    j.a = (answer){.scale = scale, .shift = shift, .residual = residual, .limits = limits, .flips = flips, .y = y,
                   .bits = out, .filters = filters_in_all, .per_group = per_group,
                   .aligned = (c->groups == 1 || c->o % 64 == 0)
                       && (per_group == filters_in_all || per_group % 64 == 0)};
    j.a.words = filters_in_all / per_group * ((per_group + 63) / 64);
    if (out != NULL && !j.a.aligned) memset(out, 0, (size_t)(c->n * c->p * c->q * j.a.words) * sizeof *out);
    j.pairs = parts(c->q, 2);
    j.nibbles = 2 * c->bytes;
    j.pixel_bytes = c->groups * ((c->i + 63) / 64) * 8;
    j.rows = (c->p - 1) * c->stride_h + (c->ku - 1) * c->dil_h + 1;
    j.columns = (2 * j.pairs - 2) * c->stride_w + (c->kv - 1) * c->dil_w + 1;
    j.stripes = parts(c->o, STRIPE);
    j.places = scratch;
    j.symbols = (uint8_t *)scratch + 2 * at_once * j.rows * row_places(&j);
    for (; j.first_sample < c->n; j.first_sample += at_once) {
        j.samples = least(at_once, c->n - j.first_sample);
        int64_t rows = j.samples * j.rows, all = j.samples * c->p * j.pairs, tiles = parts(all, PAIRS);
        j.tile = parts(all, tiles);
        et_parallel(find_places, &j, rows, rows * row_places(&j) * 3, threads);
        et_parallel_each(binary_items, &j, parts(all, j.tile) * c->groups * j.stripes,
                         2 * all * filters_in_all * c->i * c->ku * c->kv / MACS_PER_BYTE, threads);
    }
}
