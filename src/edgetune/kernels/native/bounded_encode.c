/* Error-bounded encoding: x (count) -> bytes of every chunk, then the chunks themselves. See bounded.h. */
#include "bounded_lanes.h"
#include "threads.h"
#include <stdatomic.h>

/* n whole numbers (with room for 64 more), and how they are written by Rice's code. */
typedef struct { int n, k, bytes; int32_t u[BLOCK + 64]; } numbers;

/* What a block of m values will be written as. `mask` has `toggles` changes between neighbours, or 0 where it is
 * written as it is. */
typedef struct {
    int first, m, n, wide, base_bytes, mask_bytes, toggles, bytes;
    int32_t base;
    numbers tried[2], *best, gaps;
    uint8_t mask[MASK + 8];
} block;

enum { BEYOND = 16, SIDE = 2 + 4 + MASK + 4 * BLOCK + BEYOND };

static inline uint32_t zigzag(int32_t v) { return (uint32_t)v << 1 ^ (uint32_t)(v >> 31); }

/* Chooses k and says how many bytes that takes; `sum` is that of all numbers. */
static int measure(numbers *some, uint32_t sum) {
    uint32_t high = 0;
    some->k = 0;
    while ((uint64_t)some->n << (some->k + 1) <= sum) some->k++;
    for (int i = 0; i < some->n; i++) high += (uint32_t)some->u[i] >> some->k;
    return some->bytes = (some->n * some->k + 7) / 8 + (int)((uint32_t)some->n + high + 7) / 8;
}

/* The numbers of these cells in one form. */
static void fold(const int32_t *q, int n, int form, int32_t base, numbers *to) {
    uint32_t sum = 0;
    to->n = n;
    if (form == PLAIN || form == ABOVE) for (int i = 0; i < n; i++) sum += (uint32_t)(to->u[i] = q[i] - base);
    if (form == AROUND) for (int i = 0; i < n; i++) sum += (uint32_t)(to->u[i] = (int32_t)zigzag(q[i] - base));
    if (form == STEPS) {
        to->u[0] = 0;
        for (int i = 1; i < n; i++) sum += (uint32_t)(to->u[i] = (int32_t)zigzag(q[i] - q[i - 1]));
    }
    measure(to, sum);
}

/* Takes the form in which these cells need the fewest bytes, the first of equals. */
static void choose_form(block *b, const int32_t *q) {
    int32_t least = q[0], n = b->n, taken = -1;
    int64_t sum = 0;
    for (int i = 0; i < n; i++) {
        sum += q[i];
        least = q[i] < least ? q[i] : least;
    }
    int32_t middle = (int32_t)(sum >= 0 ? sum / n : -((n - 1 - sum) / n));
    const int32_t bases[4] = {0, least, middle, q[0]};
    for (int form = least < 0 ? ABOVE : PLAIN; form <= STEPS; form++) {
        if (form == ABOVE && least == 0) continue;
        numbers *other = &b->tried[taken < 0 || b->best == &b->tried[1] ? 0 : 1];
        fold(q, n, form, bases[form], other);
        int base_bytes = form == PLAIN ? 0 : b->wide ? 4 : 2;
        if (taken >= 0 && other->bytes + base_bytes >= b->best->bytes + b->base_bytes) continue;
        b->best = other;
        b->base = bases[form];
        b->base_bytes = base_bytes;
        taken = form;
    }
    b->first |= taken << 5;
}

/* Chooses how the mask is written. */
static void measure_mask(block *b) {
    int octets = (b->m + 7) / 8, found = 0;
    numbers *gaps = &b->gaps;
    uint16_t at[BLOCK + 64];
    for (int i = 0; i < b->m; i += 64) {
        uint64_t word = load64(b->mask + i / 8), before = i ? b->mask[i / 8 - 1] >> 7 : word & 1;
        uint64_t change = word ^ (word << 1 | before);
        if (b->m - i < 64) change &= ((uint64_t)1 << (b->m - i)) - 1;
        int here = set_bits(change);
        places_of(change, i, here, at + found);
        found += here;
    }
    b->toggles = 0;
    b->mask_bytes = 1 + octets;
    gaps->n = found;
    if (found == 0) return;
    gaps->u[0] = at[0] - 1;
    for (int i = 1; i < found; i++) gaps->u[i] = at[i] - at[i - 1] - 1;
    if (2 + measure(gaps, (uint32_t)(at[found - 1] - found)) >= b->mask_bytes) return;
    b->toggles = found;
    b->mask_bytes = 2 + gaps->bytes;
}

static void count_mask(block *b) {
    b->n = 0;
    for (int i = 0; i < MASK; i += 8) b->n += set_bits(load64(b->mask + i));
    b->mask_bytes = 0;
    if (b->n > 0 && b->n < b->m) measure_mask(b);
}

static void leave_raw(block *b, const float *x) {
    look(x, b->m, 1, b->mask);
    count_mask(b);
    int masked = b->mask_bytes && b->mask_bytes + 4 * b->n < 4 * b->m;
    b->first = masked ? RAW_MASKED : RAW;
    b->bytes = 1 + (masked ? b->mask_bytes + 4 * b->n : 4 * b->m);
}

/* Decides how the m values at x are written; e is 0 where they shall be exact. */
static void plan(block *b, const float *x, int m, float e, float scale) {
    int32_t q[BLOCK + 16];
    float most;
    b->m = m;
    memset(b->mask, 0, sizeof b->mask);
    uint32_t bits = look(x, m, e == 0, b->mask);
    memcpy(&most, &bits, sizeof most);
    count_mask(b);
    if (b->n == 0) {
        b->first = NOTHING_SET;
        b->bytes = 1;
        return;
    }
    float cells = most * scale;
    if (e == 0 || !(cells <= MOST_WIDE / 2)) {  /* not for a NaN either */
        leave_raw(b, x);
        return;
    }
    b->wide = cells > MOST_CELLS;
    b->first = b->mask_bytes ? MASKED : 0;
    cells_of(x, m, b->mask, b->wide ? 2 * scale : scale, q);
    choose_form(b, q);
    b->first |= b->wide ? WIDE : b->best->k;
    b->bytes = 1 + b->wide + b->base_bytes + b->mask_bytes + b->best->bytes;
    if (b->bytes > 4 * m) leave_raw(b, x);
}

/* The k lowest bits of each number. */
static uint8_t *write_low(uint8_t *to, const numbers *some) {
    uint64_t held = 0, mask = ((uint64_t)1 << some->k) - 1;
    int fill = 0, i = 0, k = some->k;
    if (k <= 8)
        for (; i + 8 <= some->n; i += 8) {
#if defined(__AVX512VL__) && defined(__BMI2__) && !defined(ET_PLAIN)
            __m128i octets = _mm256_cvtepi32_epi8(_mm256_loadu_si256((const __m256i *)(const void *)(some->u + i)));
            uint64_t word = _pext_u64((uint64_t)_mm_cvtsi128_si64(octets), mask * 0x0101010101010101u);
#else
            uint64_t word = 0;
            for (int j = 0; j < 8; j++) word |= ((uint64_t)(uint32_t)some->u[i + j] & mask) << (j * k);
#endif
            memcpy(to, &word, sizeof word);
            to += k;
        }
    for (; i < some->n; i++) {
        held |= ((uint64_t)(uint32_t)some->u[i] & mask) << fill;
        fill += k;
        if (fill >= 32) {
            memcpy(to, &held, 4);
            to += 4;
            held >>= 32;
            fill -= 32;
        }
    }
    memcpy(to, &held, sizeof held);
    return to + (fill + 7) / 8;
}

/* What is above the k lowest bits: every number ends with a one, found by adding up, a byte each at first. */
static uint8_t *write_high(uint8_t *to, const numbers *some) {
    uint8_t ends[HIGH_BITS * BLOCK + 8] = {0};
    int at = -1, k = some->k;
    for (int i = 0; i < some->n; i++) {
        at += (int)((uint32_t)some->u[i] >> k) + 1;
        ends[at] = 1;
    }
    for (int i = 0; i <= at; i += 64) {
        uint64_t word = bits_of(ends + i);
        memcpy(to + i / 8, &word, sizeof word);
    }
    return to + at / 8 + 1;
}

static uint8_t *write_mask(uint8_t *to, const block *b) {
    *to++ = (uint8_t)b->toggles;
    if (b->toggles) {
        *to++ = (uint8_t)(b->gaps.k | (b->mask[0] & 1 ? FIRST_SET : 0));
        return write_high(write_low(to, &b->gaps), &b->gaps);
    }
    memcpy(to, b->mask, (size_t)b->mask_bytes - 1);
    return to + b->mask_bytes - 1;
}

/* Writes what was planned, and up to BEYOND bytes behind it. */
static void write_block(uint8_t *to, const block *b, const float *x) {
    int raw = (b->first & ~MASKED) == RAW;
    *to++ = (uint8_t)b->first;
    if (b->first == NOTHING_SET) return;
    if (!raw) {
        if (b->wide) *to++ = (uint8_t)b->best->k;
        memcpy(to, &b->base, sizeof b->base);
        to += b->base_bytes;
    }
    if (b->first & MASKED) to = write_mask(to, b);
    if (!raw) {
        write_high(write_low(to, b->best), b->best);
        return;
    }
    for (int i = 0; i < b->m; i++)
        if (b->first == RAW || b->mask[i / 8] >> (i % 8) & 1) {
            memcpy(to, x + i, sizeof *x);
            to += sizeof *x;
        }
}

typedef struct {
    const float *x;
    uint8_t *packed;
    int32_t *sizes;
    const int64_t *starts;
    int64_t count;
    float e, scale;
    _Atomic int64_t *unfit;
} encoding;

static void chunk_sizes(const void *job, int64_t begin, int64_t end) {
    const encoding *encoding = job;
    block b;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int32_t bytes = 0;
        int64_t stop = least((chunk + 1) * CHUNK, encoding->count);
        for (int64_t i = chunk * CHUNK; i < stop; i += BLOCK) {
            plan(&b, encoding->x + i, (int)least(BLOCK, stop - i), encoding->e, encoding->scale);
            bytes += b.bytes;
        }
        encoding->sizes[chunk] = bytes;
    }
}

static void write_chunks(const void *job, int64_t begin, int64_t end) {
    const encoding *encoding = job;
    block b;
    uint8_t side[SIDE];
    for (int64_t chunk = begin; chunk < end; chunk++) {
        uint8_t *start = encoding->packed + encoding->starts[chunk], *to = start;
        int64_t stop = least((chunk + 1) * CHUNK, encoding->count);
        int fits = 1;
        for (int64_t i = chunk * CHUNK; i < stop; i += BLOCK) {
            plan(&b, encoding->x + i, (int)least(BLOCK, stop - i), encoding->e, encoding->scale);
            int64_t room = encoding->starts[chunk + 1] - (to - encoding->packed);
            if ((fits = b.bytes <= room) == 0) break;
            int last = b.bytes + BEYOND > room;
            write_block(last ? side : to, &b, encoding->x + i);
            if (last) memcpy(to, side, (size_t)b.bytes);
            to += b.bytes;
        }
        if (!fits || to != encoding->packed + encoding->starts[chunk + 1]) atomic_fetch_add(encoding->unfit, 1);
        uint32_t entry[2] = {(uint32_t)(to - start), check_of(start, to - start, (uint64_t)chunk)};
        memcpy(encoding->packed + HEADER + ENTRY * chunk, entry, sizeof entry);
    }
}

/* sizes (chunks) gets the bytes of every chunk. */
void et_bounded_sizes_f32(const float *x, int32_t *sizes, int64_t count, float e, float scale, int threads) {
    encoding job = {.x = x, .sizes = sizes, .count = count, .e = e, .scale = scale};
    et_parallel(chunk_sizes, &job, chunks_of(count), count * (int64_t)sizeof *x, threads);
}

/* packed has its header but for the check; starts (chunks + 1) says where chunks begin, and where the last one ends.
 * Returns in `unfit` how many chunks have not the size that was given: x is another one. */
void et_bounded_encode_f32(const float *x, uint8_t *packed, const int64_t *starts, int64_t *unfit, int64_t count, float e,
                           float scale, int threads) {
    _Atomic int64_t bad = 0;
    encoding job = {.x = x, .packed = packed, .starts = starts, .count = count, .e = e, .scale = scale, .unfit = &bad};
    et_parallel(write_chunks, &job, chunks_of(count), count * (int64_t)sizeof *x, threads);
    *unfit = atomic_load(&bad);
    uint32_t check = check_of(packed + 8, starts[0] - 8, 0);
    memcpy(packed + 4, &check, sizeof check);
}
