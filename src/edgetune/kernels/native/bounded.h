/* The bytes of the error-bounded codec: what bounded_encode.c writes and bounded_decode.c reads.
 *
 * All numbers are little-endian, bits go from the lowest up. A packed tensor is
 *   header   magic u32, check u32 (of what follows up to the first chunk), values u64, bound f64, bytes u64
 *   table    one (bytes u32, check u32) a chunk of CHUNK values
 *   chunks   one after the other, each its blocks of BLOCK values, the last ones short
 * and a block, by its first byte (k in bits 0-3, MASKED, form in bits 5-6):
 *   NOTHING_SET            all zero: nothing follows
 *   RAW (MASKED)           [mask] the values themselves (those that are not all zero bits)
 *   k, form (MASKED)       [k] (where k is WIDE) [base] [mask] numbers
 * mask tells which values are not zero; n is how many. A value x lies in the cell q = floor(x / 2e) and comes back as
 * its middle, (2q+1)e; e is a little below the bound, and half of that in WIDE blocks. Cells become numbers u,
 * small where the block lets them be:
 *   PLAIN u = q; ABOVE u = q - base; AROUND u = zigzag(q - base); STEPS u = zigzag(q - the q before), from base on
 * base is an i16, in WIDE blocks an i32. Numbers are written by Rice's code: first the k lowest bits of each, then
 * what is above as so many zeros and a one, at most HIGH_BITS a number; both filled up to whole bytes with zeros.
 * mask is 0 and a bit a value; or, where that is shorter, how often neighbours differ (1-255), k | (first bit) << 4,
 * and by the same code how many values lie between one such change and the next, less one. */
#ifndef EDGETUNE_BOUNDED_H
#define EDGETUNE_BOUNDED_H
#include "element.h"

enum { BLOCK = 256, CHUNK = 32 * BLOCK, HEADER = 32, ENTRY = 8, HIGH_BITS = 3, MASK = BLOCK / 8 };
enum { MASKED = 16, WIDE = 14, NOTHING_SET = 15, RAW = 15 | 1 << 5, RAW_MASKED = RAW | MASKED };
enum { FIRST_SET = 16, MOST_GAP_K = 7 };
enum { PLAIN, ABOVE, AROUND, STEPS };
enum { MOST_CELLS = 1 << 12, MOST_WIDE = 1 << 21, MOST_K = 23 };

/* A fuzzer has to get past the checksums. */
#ifdef ET_FUZZ
#define ET_SEEMS(right) ((void)(right), 1)
#else
#define ET_SEEMS(right) (right)
#endif

static inline int64_t chunks_of(int64_t count) { return (count + CHUNK - 1) / CHUNK; }

static inline uint64_t load64(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

/* Adds up 64-bit words, each times an odd number that its place decides: a change within one word is always seen. */
static inline uint32_t check_of(const uint8_t *p, int64_t bytes, uint64_t seed) {
    const uint64_t odd = 0x9e3779b97f4a7c15u;
    uint64_t sums[4] = {seed, 1, 2, 3}, step = odd * odd * odd * odd;
    uint64_t powers[4] = {odd, odd * odd, odd * odd * odd, step};
    int64_t i = 0;
    for (; i + 32 <= bytes; i += 32)
        for (int lane = 0; lane < 4; lane++) {
            sums[lane] += load64(p + i + 8 * lane) * powers[lane];
            powers[lane] *= step;
        }
    uint8_t rest[32] = {0};
    memcpy(rest, p + i, (size_t)(bytes - i));
    for (int lane = 0; lane < 4; lane++) sums[lane] += load64(rest + 8 * lane) * powers[lane];
    uint64_t sum = (sums[0] + sums[1] + sums[2] + sums[3] + (uint64_t)bytes) * odd;
    return (uint32_t)((sum ^ sum >> 29) * odd >> 32);
}
#endif
