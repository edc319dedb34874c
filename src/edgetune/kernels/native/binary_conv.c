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
#include "binary_answer.h"
#include "depthwise.h"

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

/* `nibbles` of a pair of pixels with those of one or two blocks of filters. */
static inline __attribute__((always_inline)) void meet_pair(const uint16_t *places, const uint8_t *w, int blocks,
                                                            int64_t nibbles, uint16_t *sums, int begin) {
    counts c[2] = {{b32_zero(), b32_zero()}, {b32_zero(), b32_zero()}};
    int64_t k = 0;
    for (; k + 3 <= nibbles; k += 3) {
        b32 sum[2];
        for (int step = 0; step < 3; step++) {
            table16 table = table_of(places[k + step]);
            for (int v = 0; v < blocks; v++) {
                b32 found = b32_lookup(table, b32_load(w + ((k + step) * blocks + v) * LANES));
                sum[v] = step ? b32_add(sum[v], found) : found;
            }
        }
        for (int v = 0; v < blocks; v++) c[v] = count_more(c[v], sum[v]);
    }
    for (; k < nibbles; k++) {
        table16 table = table_of(places[k]);
        for (int v = 0; v < blocks; v++)
            c[v] = count_more(c[v], b32_lookup(table, b32_load(w + (k * blocks + v) * LANES)));
    }
    for (int v = 0; v < blocks; v++) add_up(c[v], sums + v * LANES, STRIPE, begin);
}

/* All pairs of an item, `nibbles` of each from `start` on. */
static inline __attribute__((always_inline)) void meet_all(const uint16_t *start, const int64_t *offsets, int64_t pairs,
                                                           const uint8_t *w, int blocks, int64_t nibbles,
                                                           uint16_t *sums, int begin) {
    for (int64_t n = 0; n < pairs; n++)
        meet_pair(start + offsets[n], w, blocks, nibbles, sums + n * 2 * STRIPE, begin);
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

/* Of a stripe of depthwise channels: up to how many differences its bits are set, in planes and by the number of taps. */
typedef struct {
    wide up_to[MOST_TAPS + 1][PLANES], never[MOST_TAPS + 1], flips;
    uint8_t known[MOST_TAPS + 1];
} bounds;

static void read_flips(const answer *a, int64_t first, int64_t count, bounds *to) {
    memset(to->known, 0, sizeof to->known);
    to->flips = (wide){0};
    for (int64_t k = 0; a->flips != NULL && k < count; k++)
        if (a->flips[first + k]) to->flips[k / 64] |= (uint64_t)1 << k % 64;
}

/* taps - 2 * differences reach a limit where there are up to (taps - limit) / 2 differences. */
static void read_bounds(const answer *a, int64_t first, int64_t count, int64_t taps, bounds *to) {
    wide planes[PLANES] = {{0}}, never = {0};
    for (int64_t k = 0; k < count; k++) {
        int64_t room = taps - (int64_t)a->limits[first + k], most = least(room / 2, (1 << PLANES) - 1);
        uint64_t bit = (uint64_t)1 << k % 64;
        if (room < 0) never[k / 64] |= bit;
        for (int b = 0; room >= 0 && b < PLANES; b++)
            if (most >> b & 1) planes[b][k / 64] |= bit;
    }
    memcpy(to->up_to[taps], planes, sizeof planes);
    to->never[taps] = never;
    to->known[taps] = 1;
}

/* Which of the counts are at most their bounds. */
static inline __attribute__((always_inline)) void within(const wide *plane, int planes, const bounds *b, int64_t taps,
                                                         wide *bits) {
    wide more = {0}, beyond = {0};
    for (int k = planes; k < PLANES; k++) beyond |= b->up_to[taps][k];
    for (int k = 0; k < planes; k++) {
        wide most = b->up_to[taps][k];
        more = (plane[k] & ~most) | (more & ~(plane[k] ^ most));
    }
    *bits = (~more | beyond) & ~b->never[taps];
}

/* A row of the answer, `count` words of channels; with `planes` bits a count. */
static inline __attribute__((always_inline)) void depthwise_row(const binary_job *j, const channels *at, int64_t row,
                                                                int planes, bounds *limits, const stripe *stripes) {
    const convolution *c = &j->c;
    const answer *a = &j->a;
    int64_t first = 64 * at->word, count = least(WIDE, c->groups - first);
    wanted want = wanted_of(a);
    wide plane[PLANES];
    for (int64_t q = 0; q < c->q; q++) {
        int64_t taps = count_planes(c, at, row, q, planes, plane), pixel = row * c->q + q;
        if (!want.floats) {
            if (!limits->known[taps]) read_bounds(a, first, count, taps, limits);
            wide bits;
            within(plane, planes, limits, taps, &bits);
            bits ^= limits->flips;
            for (int64_t k = 0; k < at->count; k++) {
                int64_t here = least(64, count - 64 * k);
                a->bits[pixel * a->words + at->word + k] = bits[k] & (~(uint64_t)0 >> (64 - here));
            }
            continue;
        }
        for (int k = 0; k < at->count; k++) {
            uint16_t counts[64];
            counts_of(plane, k, planes, counts);
            want.whole = stripes[k].count == STRIPE;
            put_pixel(a, stripes + k, pixel, (float)taps, counts, NULL, want);
        }
    }
}

/* Items are (words of channels, sample, row). */
static void depthwise_items(const void *job, int64_t begin, int64_t end) {
    const binary_job *j = job;
    const convolution *c = &j->c;
    int64_t rows = c->n * c->p, words = parts(c->groups, 64), taps = c->ku * c->kv;
    wide w[MOST_TAPS];
    bounds limits;
    stripe stripes[WORDS];
    channels at = {.bits = (const uint64_t *)(const void *)j->bits, .w = w, .word = -1};
    for (int64_t item = begin; item < end; item++) {
        int64_t word = item / rows * WORDS;
        if (word != at.word) {
            at.word = word;
            at.count = least(WORDS, words - word);
            for (int64_t t = 0; t < taps; t++)
                read_wide((const uint64_t *)(const void *)j->filters + t * words + word, at.count, w + t);
            read_flips(&j->a, 64 * word, least(WIDE, c->groups - 64 * word), &limits);
            for (int64_t k = 0; k < at.count; k++) {
                int64_t first = 64 * (word + k);
                read_stripe(&j->a, first, least(STRIPE, c->groups - first), stripes + k);
            }
        }
        if (taps < 16) depthwise_row(j, &at, item % rows, 4, &limits, stripes);
        else depthwise_row(j, &at, item % rows, PLANES, &limits, stripes);
    }
}

/* sizes: as convolution_of reads them, then samples at a time.
 * scratch: 3 bytes a nibble of so many padded samples, the places of two bytes first. y, out or both are wanted; of
 * limits there is no y. */
void et_binary_conv_f32(const uint8_t *bits, const uint8_t *filters, const float *scale, const float *gain,
                        const float *shift, const float *residual, const int32_t *limits, const uint8_t *flips,
                        float *y, uint64_t *out, void *scratch, const int64_t *sizes, float low, float high,
                        int threads) {
    enum { MACS_PER_BYTE = 64 };  /* what is worth a thread is told in bytes */
    binary_job j = {.c = convolution_of(sizes), .bits = bits, .filters = filters};
    const convolution *c = &j.c;
    int64_t filters_in_all = c->o * c->groups, at_once = sizes[19];
    int64_t macs = c->n * c->p * c->q * filters_in_all * c->i * c->ku * c->kv;
    j.a = (answer){.scale = scale, .gain = gain, .shift = shift, .residual = residual, .low = low, .high = high,
                   .limits = limits, .flips = flips, .y = y, .bits = out, .filters = filters_in_all,
                   .words = parts(filters_in_all, 64),
                   .aligned = c->groups == 1 || c->o % 64 == 0 || is_depthwise(c)};
    if (out != NULL && !j.a.aligned) memset(out, 0, (size_t)(c->n * c->p * c->q * j.a.words) * sizeof *out);
    if (is_depthwise(c)) {
        et_parallel(depthwise_items, &j, c->n * c->p * parts(c->groups, WIDE), macs, threads);
        return;
    }
    j.pairs = parts(c->q, 2);
    j.nibbles = 2 * c->bytes;
    j.pixel_bytes = parts(c->groups * c->i, 64) * 8;
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
                         macs / MACS_PER_BYTE * j.samples / c->n, threads);
    }
}
