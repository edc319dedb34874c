/* Thirty-two bytes at a time, looked up in tables of sixteen: AVX2, NEON or plain C (also with -DET_PLAIN), as simd.h.
 *
 * A b32 is also sixteen numbers of 16 bits, two bytes each, the lower one first. */
#ifndef EDGETUNE_LOOKUP_H
#define EDGETUNE_LOOKUP_H

#include "simd.h"

#if defined(__AVX2__) && !defined(ET_PLAIN)
typedef __m256i b32;
typedef __m256i table16;

static inline b32 b32_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void b32_store(void *p, b32 a) { _mm256_storeu_si256((__m256i *)p, a); }
static inline b32 b32_zero(void) { return _mm256_setzero_si256(); }
static inline table16 table_at(const void *p) { return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)p)); }
/* Entry i of the table for every byte i, all below 16. */
static inline b32 b32_lookup(table16 table, b32 i) { return _mm256_shuffle_epi8(table, i); }
static inline b32 b32_add(b32 a, b32 b) { return _mm256_add_epi8(a, b); }
/* `value` in the bytes whose bits are set, else 0. */
#if defined(__AVX512BW__) && defined(__AVX512VL__)
static inline b32 b32_where(uint32_t bits, int value) { return _mm256_maskz_set1_epi8(bits, (char)value); }
#else
static inline b32 b32_where(uint32_t bits, int value) {
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), byte), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(own, bit), _mm256_set1_epi8((char)value));
}
#endif
static inline b32 b32_low_nibbles(b32 a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
static inline b32 b32_high_nibbles(b32 a) { return b32_low_nibbles(_mm256_srli_epi16(a, 4)); }
/* Of numbers of 16 bits. */
static inline b32 w16_add(b32 a, b32 b) { return _mm256_add_epi16(a, b); }
static inline b32 w16_sub(b32 a, b32 b) { return _mm256_sub_epi16(a, b); }
static inline b32 w16_right4(b32 a) { return _mm256_srli_epi16(a, 4); }
static inline b32 w16_low(b32 a) { return _mm256_and_si256(a, _mm256_set1_epi16(0xff)); }
static inline b32 w16_high(b32 a) { return _mm256_srli_epi16(a, 8); }
static inline b32 w16_times16(b32 a) { return _mm256_slli_epi16(a, 4); }
static inline v8 v8_counts(const uint16_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}
/* Which lanes of a are at least those of b; not where one is NaN. */
static inline unsigned v8_at_least(v8 a, v8 b) { return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }

#elif defined(__aarch64__) && !defined(ET_PLAIN)
typedef struct { uint8x16_t a, b; } b32;
typedef uint8x16_t table16;
#define EACH_HALF(x, f, ...) (b32){f((x).a, __VA_ARGS__), f((x).b, __VA_ARGS__)}
#define AS16 vreinterpretq_u16_u8
#define AS8 vreinterpretq_u8_u16

static inline b32 b32_load(const void *p) { return (b32){vld1q_u8(p), vld1q_u8((const uint8_t *)p + 16)}; }
static inline void b32_store(void *p, b32 x) { vst1q_u8(p, x.a); vst1q_u8((uint8_t *)p + 16, x.b); }
static inline b32 b32_zero(void) { return (b32){vdupq_n_u8(0), vdupq_n_u8(0)}; }
static inline table16 table_at(const void *p) { return vld1q_u8(p); }
static inline b32 b32_lookup(table16 table, b32 i) { return (b32){vqtbl1q_u8(table, i.a), vqtbl1q_u8(table, i.b)}; }
static inline b32 b32_add(b32 x, b32 y) { return (b32){vaddq_u8(x.a, y.a), vaddq_u8(x.b, y.b)}; }
static inline uint8x16_t half_where(uint32_t bits, int value) {
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    uint8x16_t own = vcombine_u8(vdup_n_u8((uint8_t)bits), vdup_n_u8((uint8_t)(bits >> 8)));
    return vandq_u8(vtstq_u8(own, bit), vdupq_n_u8((uint8_t)value));
}
static inline b32 b32_where(uint32_t bits, int value) {
    return (b32){half_where(bits, value), half_where(bits >> 16, value)};
}
static inline b32 b32_low_nibbles(b32 x) { return EACH_HALF(x, vandq_u8, vdupq_n_u8(15)); }
static inline b32 b32_high_nibbles(b32 x) { return EACH_HALF(x, vshrq_n_u8, 4); }
static inline b32 w16_add(b32 x, b32 y) {
    return (b32){AS8(vaddq_u16(AS16(x.a), AS16(y.a))), AS8(vaddq_u16(AS16(x.b), AS16(y.b)))};
}
static inline b32 w16_sub(b32 x, b32 y) {
    return (b32){AS8(vsubq_u16(AS16(x.a), AS16(y.a))), AS8(vsubq_u16(AS16(x.b), AS16(y.b)))};
}
static inline b32 w16_right4(b32 x) { return (b32){AS8(vshrq_n_u16(AS16(x.a), 4)), AS8(vshrq_n_u16(AS16(x.b), 4))}; }
static inline b32 w16_low(b32 x) { return EACH_HALF(x, vandq_u8, AS8(vdupq_n_u16(0xff))); }
static inline b32 w16_high(b32 x) { return (b32){AS8(vshrq_n_u16(AS16(x.a), 8)), AS8(vshrq_n_u16(AS16(x.b), 8))}; }
static inline b32 w16_times16(b32 x) { return (b32){AS8(vshlq_n_u16(AS16(x.a), 4)), AS8(vshlq_n_u16(AS16(x.b), 4))}; }
static inline v8 v8_counts(const uint16_t *p) {
    uint16x8_t half = vld1q_u16(p);
    return (v8){vcvtq_f32_u32(vmovl_u16(vget_low_u16(half))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(half)))};
}
static inline unsigned v8_at_least(v8 x, v8 y) {
    const uint32x4_t first = {1, 2, 4, 8}, last = {16, 32, 64, 128};
    return vaddvq_u32(vorrq_u32(vandq_u32(vcgeq_f32(x.a, y.a), first), vandq_u32(vcgeq_f32(x.b, y.b), last)));
}

#else
typedef struct { uint8_t lane[32]; } b32;
typedef const uint8_t *table16;
#define EACH_BYTE for (int i = 0; i < 32; i++)
#define EACH_WORD(r, value) \
    b32 r; \
    for (int i = 0; i < 16; i++) { \
        unsigned word = (value); \
        r.lane[2 * i] = (uint8_t)word; \
        r.lane[2 * i + 1] = (uint8_t)(word >> 8); \
    }
#define WORD(x) ((unsigned)(x).lane[2 * i] | (unsigned)(x).lane[2 * i + 1] << 8)

static inline b32 b32_load(const void *p) { b32 r; memcpy(&r, p, sizeof r); return r; }
static inline void b32_store(void *p, b32 a) { memcpy(p, &a, sizeof a); }
static inline b32 b32_zero(void) { return (b32){{0}}; }
static inline table16 table_at(const void *p) { return p; }
static inline b32 b32_lookup(table16 table, b32 at) { EACH_BYTE at.lane[i] = table[at.lane[i]]; return at; }
static inline b32 b32_add(b32 a, b32 b) { EACH_BYTE a.lane[i] = (uint8_t)(a.lane[i] + b.lane[i]); return a; }
static inline b32 b32_where(uint32_t bits, int value) {
    b32 r;
    EACH_BYTE r.lane[i] = bits >> i & 1 ? (uint8_t)value : 0;
    return r;
}
static inline b32 b32_low_nibbles(b32 a) { EACH_BYTE a.lane[i] &= 15; return a; }
static inline b32 b32_high_nibbles(b32 a) { EACH_BYTE a.lane[i] >>= 4; return a; }
static inline b32 w16_add(b32 a, b32 b) { EACH_WORD(r, WORD(a) + WORD(b)) return r; }
static inline b32 w16_sub(b32 a, b32 b) { EACH_WORD(r, WORD(a) - WORD(b)) return r; }
static inline b32 w16_right4(b32 a) { EACH_WORD(r, WORD(a) >> 4) return r; }
static inline b32 w16_low(b32 a) { EACH_WORD(r, WORD(a) & 0xff) return r; }
static inline b32 w16_high(b32 a) { EACH_WORD(r, WORD(a) >> 8) return r; }
static inline b32 w16_times16(b32 a) { EACH_WORD(r, WORD(a) << 4) return r; }
static inline v8 v8_counts(const uint16_t *p) { v8 r; EACH r.lane[i] = (float)p[i]; return r; }
static inline unsigned v8_at_least(v8 a, v8 b) {
    unsigned mask = 0;
    EACH mask |= (unsigned)(a.lane[i] >= b.lane[i]) << i;
    return mask;
}
#endif

#endif
