/* Error-bounded decoding: the chunks of bounded.h -> values (count). Takes any bytes: what does not add up is refused,
 * and nothing outside of what is given is read or written. */
#include "bounded_lanes.h"
#include "threads.h"
#include <stdatomic.h>

/* A block's numbers on their way to values. Behind its first
 * element, `ends` is where the ones of the high bits lie. Reading and writing may go beyond what is used. */
typedef struct {
    uint8_t high[HIGH_BITS * MASK + 8], low[MOST_K * MASK + 24], mask[MASK + 8];
    uint16_t ends[1 + BLOCK + 64];
    uint32_t u[BLOCK + 16];
    float values[BLOCK + 16];
} unpacked;

typedef struct { const uint8_t *at, *end; } bytes_left;

/* Copies the next bytes; 0 where there are not so many. */
static inline int take(bytes_left *left, void *to, int64_t bytes) {
    if (left->end - left->at < bytes) return 0;
    memcpy(to, left->at, (size_t)bytes);
    left->at += bytes;
    return 1;
}

/* Positions of the first n ones of the high bits; returns how many bytes these take, 0 where there are not so many. */
static int find_ends(unpacked *block, int n, int bytes) {
    int found = 0;
    for (int i = 0; i < bytes; i += 8) {
        uint64_t word = load64(block->high + i);
        int here = (int)least(set_bits(word), n - found);
        places_of(word, 8 * i, here, block->ends + 1 + found);
        found += here;
        if (found == n) return block->ends[n] / 8 + 1;
    }
    return 0;
}

/* The k lowest bits of n numbers. */
static void read_low(unpacked *block, int n, int k) {
    int i = 0;
#if defined(__AVX2__) && !defined(ET_PLAIN)
    /* Four values lie within the 16 bytes from the first one on, and each within 4 of them. */
    int second = k / 2, odd = k % 2 * 4;
    __m256i bit = _mm256_add_epi32(_mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3), _mm256_set1_epi32(k)),
                                   _mm256_setr_epi32(0, 0, 0, 0, odd, odd, odd, odd));
    __m256i from = _mm256_mullo_epi32(_mm256_srli_epi32(bit, 3), _mm256_set1_epi32(0x01010101));
    __m256i shift = _mm256_and_si256(bit, _mm256_set1_epi32(7)), mask = _mm256_set1_epi32((1 << k) - 1);
    from = _mm256_add_epi32(from, _mm256_set1_epi32(0x03020100));
    for (const uint8_t *p = block->low; i < n; i += 8, p += k) {
        __m256i bytes = _mm256_loadu2_m128i((const __m128i *)(const void *)(p + second), (const __m128i *)(const void *)p);
        __m256i low = _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, from), shift), mask);
        _mm256_storeu_si256((__m256i *)(void *)(block->u + i), low);
    }
#endif
    uint64_t mask_of_one = ((uint64_t)1 << k) - 1;
    for (; i < n; i++) {
        int at = i * k;
        block->u[i] = (uint32_t)(load64(block->low + at / 8) >> (at % 8) & mask_of_one);
    }
}

static void add_high(unpacked *block, int n, int k) {
    for (int i = 0; i < n; i++)
        block->u[i] += (uint32_t)(uint16_t)(block->ends[i + 1] - block->ends[i] - 1) << k;
}

static inline uint32_t unzigzag(uint32_t u) { return u >> 1 ^ (0 - (u & 1)); }

/* Numbers become cells and cells their middles. */
static void unfold(unpacked *block, int n, int form, uint32_t base, float e) {
    uint32_t *u = block->u;
    if (form == ABOVE) for (int i = 0; i < n; i++) u[i] += base;
    if (form == AROUND) for (int i = 0; i < n; i++) u[i] = unzigzag(u[i]) + base;
    if (form == STEPS)
        for (int i = 0; i < n; i++) {
            base += unzigzag(u[i]);
            u[i] = base;
        }
    for (int i = 0; i < n; i++) block->values[i] = (float)(int32_t)(2 * u[i] + 1) * e;
}

/* n numbers by Rice's code; 0 where the bytes are none. */
static int read_numbers(bytes_left *left, unpacked *block, int n, int k) {
    if (!take(left, block->low, (n * k + 7) / 8)) return 0;
    int high = (int)least(left->end - left->at, (HIGH_BITS * n + 7) / 8);
    memset(block->high + high / 8 * 8, 0, 8);
    memcpy(block->high, left->at, (size_t)high);
    int used = find_ends(block, n, high);
    if (used == 0 || used > high) return 0;
    left->at += used;
    block->ends[0] = UINT16_MAX;
    read_low(block, n, k);
    add_high(block, n, k);
    return 1;
}

/* The mask of m values from where its neighbours differ; 0 where that is beyond them. */
static int flip(unpacked *block, int m, int toggles, int first) {
    uint64_t words[BLOCK / 64 + 1] = {0}, carry = first ? ~(uint64_t)0 : 0;
    int at = 0;
    for (int i = 0; i < toggles; i++) {
        at += (int)least(block->u[i], BLOCK) + 1;
        if (at >= m) return 0;
        words[at / 64] |= (uint64_t)1 << (at % 64);
    }
    for (int i = 0; i < BLOCK / 64; i++) {
        for (int by = 1; by < 64; by *= 2) words[i] ^= words[i] << by;
        words[i] ^= carry;
        carry = words[i] >> 63 ? ~(uint64_t)0 : 0;
    }
    memcpy(block->mask, words, MASK);
    return 1;
}

/* How many of m values are not zero; 0 where the bytes are no mask. */
static int read_mask(bytes_left *left, unpacked *block, int m) {
    uint8_t toggles, kind;
    int n = 0;
    if (!take(left, &toggles, 1)) return 0;
    if (toggles == 0) {
        memset(block->mask, 0, MASK);
        if (!take(left, block->mask, (m + 7) / 8)) return 0;
    } else {
        if (!take(left, &kind, 1) || (kind & ~FIRST_SET) > MOST_GAP_K) return 0;
        if (!read_numbers(left, block, toggles, kind & ~FIRST_SET)) return 0;
        if (!flip(block, m, toggles, kind & FIRST_SET)) return 0;
    }
    if (m < BLOCK) {
        block->mask[m / 8] &= (uint8_t)((1u << (m % 8)) - 1);
        memset(block->mask + m / 8 + 1, 0, (size_t)(MASK - m / 8 - 1));
    }
    for (int i = 0; i < MASK; i += 8) n += set_bits(load64(block->mask + i));
    return n;
}

static int read_raw(bytes_left *left, unpacked *block, int m, int masked, float *out) {
    if (!masked) return take(left, out, 4 * m);
    int n = read_mask(left, block, m);
    if (n == 0 || !take(left, block->values, 4 * n)) return 0;
    spread(block->values, m, block->mask, out);
    return 1;
}

/* A block of m values as cells; 0 where its bytes are none. */
static int read_cells(bytes_left *left, unpacked *block, int first, int m, float e, float *out) {
    uint8_t k = first & 15;
    int form = first >> 5, masked = first & MASKED, wide = k == WIDE, n = m;
    int16_t narrow = 0;
    int32_t base = 0;
    if (wide && !take(left, &k, 1)) return 0;
    if (k > MOST_K || form > STEPS) return 0;
    if (form != PLAIN && !(wide ? take(left, &base, 4) : take(left, &narrow, 2))) return 0;
    if (masked) n = read_mask(left, block, m);
    if (n == 0 || !read_numbers(left, block, n, k)) return 0;
    unfold(block, n, form, (uint32_t)(wide ? base : narrow), wide ? e / 2 : e);
    if (masked) spread(block->values, m, block->mask, out);
    else memcpy(out, block->values, (size_t)m * sizeof *out);
    return 1;
}

static int read_block(bytes_left *left, unpacked *block, int m, float e, float *out) {
    uint8_t first;
    if (!take(left, &first, 1)) return 0;
    if (first == NOTHING_SET) return memset(out, 0, (size_t)m * sizeof *out), 1;
    if ((first & ~MASKED) == RAW) return read_raw(left, block, m, first & MASKED, out);
    return (first & 15) != NOTHING_SET && read_cells(left, block, first, m, e, out);
}

typedef struct {
    const uint8_t *packed;
    const int64_t *starts;
    float *out;
    int64_t count;
    float e;
    _Atomic int64_t *broken;
} decoding;

static void read_chunks(const void *job, int64_t begin, int64_t end) {
    const decoding *decoding = job;
    unpacked block;
    memset(&block, 0, sizeof block);
    for (int64_t chunk = begin; chunk < end; chunk++) {
        uint32_t entry[2];
        memcpy(entry, decoding->packed + HEADER + ENTRY * chunk, sizeof entry);
        bytes_left left = {decoding->packed + decoding->starts[chunk], decoding->packed + decoding->starts[chunk + 1]};
        int good = ET_SEEMS(check_of(left.at, left.end - left.at, (uint64_t)chunk) == entry[1]);
        int64_t stop = least((chunk + 1) * CHUNK, decoding->count);
        for (int64_t i = chunk * CHUNK; good && i < stop; i += BLOCK)
            good = read_block(&left, &block, (int)least(BLOCK, stop - i), decoding->e, decoding->out + i);
        if (!good || left.at != left.end) atomic_fetch_add(decoding->broken, 1);
    }
}

/* starts (chunks + 1) gets where chunks begin; 0 where header and table do not fit the `bytes` there are. */
static int find_starts(const uint8_t *packed, int64_t bytes, int64_t *starts, int64_t count) {
    int64_t chunks = chunks_of(count);
    uint32_t check;
    if ((bytes - HEADER) / ENTRY < chunks) return 0;
    starts[0] = HEADER + ENTRY * chunks;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        uint32_t size;
        memcpy(&size, packed + HEADER + ENTRY * chunk, sizeof size);
        starts[chunk + 1] = starts[chunk] + size;
        if (starts[chunk + 1] > bytes) return 0;
    }
    memcpy(&check, packed + 4, sizeof check);
    return starts[chunks] == bytes && ET_SEEMS(check_of(packed + 8, starts[0] - 8, 0) == check);
}

/* Returns in `broken` how many chunks were none: -1 where header and table don't fit. `count` and `e` are those that
 * the header tells, which the caller has compared with what it expects; `starts` (chunks + 1) is scratch. */
void et_bounded_decode_f32(const uint8_t *packed, int64_t bytes, float *out, int64_t *starts, int64_t *broken,
                           int64_t count, float e, int threads) {
    _Atomic int64_t bad = 0;
    *broken = -1;
    if (bytes < HEADER || !find_starts(packed, bytes, starts, count)) return;
    decoding job = {packed, starts, out, count, e, &bad};
    et_parallel(read_chunks, &job, chunks_of(count), count * (int64_t)sizeof *out, threads);
    *broken = atomic_load(&bad);
}
