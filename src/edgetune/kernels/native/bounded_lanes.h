/* Leaving zeros out and putting them back; which bits of a word are set. Sixteen or eight at a time, or one. */
#ifndef EDGETUNE_BOUNDED_LANES_H
#define EDGETUNE_BOUNDED_LANES_H
#include "bounded.h"
#include "simd.h"

/* The cell of x * scale, towards minus infinity. */
static inline int32_t cell_of(float x, float scale) {
    float s = x * scale;
    int32_t cell = (int32_t)s;
    return cell - (s < (float)cell);
}

static inline int set_bits(uint64_t word) { return __builtin_popcountll(word); }

/* The largest magnitude among m values, as bits; mask gets a bit a value that isn't zero, `exactly` counting -0. */
static uint32_t look(const float *x, int m, int exactly, uint8_t *mask) {
    const uint32_t ignored = exactly ? 0 : 0x80000000u;
    uint32_t most = 0, bits[BLOCK];
    memcpy(bits, x, (size_t)m * sizeof *x);
    for (int i = m; i < (m + 7) / 8 * 8; i++) bits[i] = 0;
    for (int i = 0; i < m; i++) {
        uint32_t magnitude = bits[i] & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    for (int i = 0; i < m; i += 8) {
#if defined(__AVX2__) && !defined(ET_PLAIN)
        __m256i lanes = _mm256_loadu_si256((const __m256i *)(const void *)(bits + i));
        __m256i zero = _mm256_cmpeq_epi32(_mm256_andnot_si256(_mm256_set1_epi32((int)ignored), lanes),
                                          _mm256_setzero_si256());
        mask[i / 8] = (uint8_t)~_mm256_movemask_ps(_mm256_castsi256_ps(zero));
#else
        unsigned byte = 0;
        for (int j = 0; j < 8; j++) byte |= (unsigned)((bits[i + j] & ~ignored) != 0) << j;
        mask[i / 8] = (uint8_t)byte;
#endif
    }
    return most;
}

#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(ET_PLAIN)
/* For each byte of a mask: the places of its ones, side by side; and of each place, how many ones lie before it. */
static struct { uint8_t places[256][8], ones_before[256][8]; } lanes_of;

__attribute__((constructor)) static void fill_lanes(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int i = 0, n = 0; i < 8; i++) {
            lanes_of.ones_before[mask][i] = (uint8_t)n;
            if (mask >> i & 1) lanes_of.places[mask][n++] = (uint8_t)i;
        }
}

static inline __m256i eight_of(const uint8_t *places) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)places));
}
#endif

/* The cells of the values whose bit is set, side by side; returns how many. q has room for 16 more. */
static int cells_of(const float *x, int m, const uint8_t *mask, float scale, int32_t *q) {
    int n = 0, i = 0;
#if defined(__AVX512F__) && !defined(ET_PLAIN)
    const __m512 by = _mm512_set1_ps(scale);
    for (; i < m; i += 16) {
        __mmask16 lanes = (__mmask16)(mask[i / 8] | (i + 8 < m ? mask[i / 8 + 1] << 8 : 0));
        __m512 s = _mm512_mul_ps(_mm512_maskz_loadu_ps(v16_lanes(m - i), x + i), by);
        __m512i cell = _mm512_cvttps_epi32(_mm512_roundscale_ps(s, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
        _mm512_storeu_si512(q + n, _mm512_maskz_compress_epi32(lanes, cell));
        n += set_bits(lanes);
    }
#elif defined(__AVX2__) && !defined(ET_PLAIN)
    for (; i + 8 <= m; i += 8) {
        __m256 s = _mm256_floor_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(scale)));
        __m256i cells = _mm256_permutevar8x32_epi32(_mm256_cvttps_epi32(s), eight_of(lanes_of.places[mask[i / 8]]));
        _mm256_storeu_si256((__m256i *)(void *)(q + n), cells);
        n += set_bits(mask[i / 8]);
    }
#endif
    for (; i < m; i++) {
        q[n] = cell_of(x[i], scale);
        n += mask[i / 8] >> (i % 8) & 1;
    }
    return n;
}

/* The other way: m values, 0 where no bit is set; `packed` has room for 16 more. */
static void spread(const float *packed, int m, const uint8_t *mask, float *out) {
    int n = 0, i = 0;
#if defined(__AVX512F__) && !defined(ET_PLAIN)
    for (; i < m; i += 16) {
        __mmask16 lanes = (__mmask16)(mask[i / 8] | (i + 8 < m ? mask[i / 8 + 1] << 8 : 0));
        _mm512_mask_storeu_ps(out + i, v16_lanes(m - i), _mm512_maskz_expand_ps(lanes, _mm512_loadu_ps(packed + n)));
        n += set_bits(lanes);
    }
#elif defined(__AVX2__) && !defined(ET_PLAIN)
    for (; i + 8 <= m; i += 8) {
        __m256i from = eight_of(lanes_of.ones_before[mask[i / 8]]);
        v8_store(out + i, v8_keep(_mm256_permutevar8x32_ps(_mm256_loadu_ps(packed + n), from), mask[i / 8]));
        n += set_bits(mask[i / 8]);
    }
#endif
    for (; i < m; i++) {
        uint32_t bits, set = mask[i / 8] >> (i % 8) & 1;
        memcpy(&bits, packed + n, sizeof bits);
        bits &= 0 - set;  /* no branch, which would be guessed wrong half of the time */
        memcpy(out + i, &bits, sizeof bits);
        n += (int)set;
    }
}

/* 64 bytes of 0 or 1 as bits. */
static inline uint64_t bits_of(const uint8_t *flags) {
#if defined(__AVX512BW__) && !defined(ET_PLAIN)
    __m512i bytes = _mm512_loadu_si512(flags);
    return _mm512_test_epi8_mask(bytes, bytes);
#elif defined(__AVX2__) && !defined(ET_PLAIN)
    __m256i low = _mm256_loadu_si256((const __m256i *)(const void *)flags);
    __m256i high = _mm256_loadu_si256((const __m256i *)(const void *)(flags + 32));
    uint64_t both = (uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(high, 7));
    return both << 32 | (uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(low, 7));
#else
    uint64_t word = 0;
    for (int i = 0; i < 8; i++) word |= (load64(flags + 8 * i) * 0x0102040810204080u >> 56) << (8 * i);
    return word;
#endif
}

/* Positions of the word's ones, as many of them as `to` has room for: 64 may be written. */
static inline void places_of(uint64_t word, int offset, int count, uint16_t *to) {
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && !defined(ET_PLAIN)
    static const uint8_t order[64] = {
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30,
        31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58,
        59, 60, 61, 62, 63};
    __m512i set = _mm512_maskz_compress_epi8(word, _mm512_loadu_si512(order)), by = _mm512_set1_epi16((short)offset);
    _mm512_storeu_si512(to, _mm512_add_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(set)), by));
    if (count > 32)
        _mm512_storeu_si512(to + 32, _mm512_add_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(set, 1)), by));
#else
    for (int i = 0; i < count; i += 4)
        for (int step = 0; step < 4; step++) {
            to[i + step] = (uint16_t)(offset + (word ? __builtin_ctzll(word) : 0));
            word &= word - 1;
        }
#endif
}

#endif
