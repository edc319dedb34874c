/* Eight whole numbers of 32 bits at a time, without sign: AVX2, NEON or plain C, as simd.h. All wrap around. */
#ifndef EDGETUNE_WHOLE_H
#define EDGETUNE_WHOLE_H

#include "simd.h"

#if defined(__AVX2__) && !defined(ET_PLAIN)
typedef __m256i w8;

static inline w8 w8_all(uint32_t a) { return _mm256_set1_epi32((int)a); }
/* a, a+1, ..., a+7 */
static inline w8 w8_from(uint32_t a) { return _mm256_add_epi32(w8_all(a), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
static inline w8 w8_add(w8 a, w8 b) { return _mm256_add_epi32(a, b); }
static inline w8 w8_mul(w8 a, w8 b) { return _mm256_mullo_epi32(a, b); }
static inline w8 w8_xor(w8 a, w8 b) { return _mm256_xor_si256(a, b); }
static inline w8 w8_and(w8 a, w8 b) { return _mm256_and_si256(a, b); }
static inline w8 w8_or(w8 a, w8 b) { return _mm256_or_si256(a, b); }
static inline w8 w8_least(w8 a, w8 b) { return _mm256_min_epu32(a, b); }
static inline w8 w8_right(w8 a, int by) { return _mm256_srli_epi32(a, by); }
static inline w8 w8_left(w8 a, int by) { return _mm256_slli_epi32(a, by); }
/* The nearest whole number, ties to even, of floats from 0 to 2^31. */
static inline w8 w8_nearest(v8 a) { return _mm256_cvtps_epi32(a); }
/* As floats: numbers below 2^24. */
static inline v8 w8_float(w8 a) { return _mm256_cvtepi32_ps(a); }
static inline w8 w8_load_bytes(const uint8_t *p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p));
}
/* Numbers 0..255. */
static inline void w8_store_bytes(uint8_t *p, w8 a) {
    __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packus_epi16(half, half));
}

#elif defined(__aarch64__) && !defined(ET_PLAIN)
typedef struct { uint32x4_t a, b; } w8;

static inline w8 w8_all(uint32_t a) { return (w8){vdupq_n_u32(a), vdupq_n_u32(a)}; }
static inline w8 w8_from(uint32_t a) {
    const uint32x4_t low = {0, 1, 2, 3}, high = {4, 5, 6, 7};
    return (w8){vaddq_u32(vdupq_n_u32(a), low), vaddq_u32(vdupq_n_u32(a), high)};
}
static inline w8 w8_add(w8 x, w8 y) { return (w8){vaddq_u32(x.a, y.a), vaddq_u32(x.b, y.b)}; }
static inline w8 w8_mul(w8 x, w8 y) { return (w8){vmulq_u32(x.a, y.a), vmulq_u32(x.b, y.b)}; }
static inline w8 w8_xor(w8 x, w8 y) { return (w8){veorq_u32(x.a, y.a), veorq_u32(x.b, y.b)}; }
static inline w8 w8_and(w8 x, w8 y) { return (w8){vandq_u32(x.a, y.a), vandq_u32(x.b, y.b)}; }
static inline w8 w8_or(w8 x, w8 y) { return (w8){vorrq_u32(x.a, y.a), vorrq_u32(x.b, y.b)}; }
static inline w8 w8_least(w8 x, w8 y) { return (w8){vminq_u32(x.a, y.a), vminq_u32(x.b, y.b)}; }
static inline w8 w8_right(w8 x, int by) {
    return (w8){vshlq_u32(x.a, vdupq_n_s32(-by)), vshlq_u32(x.b, vdupq_n_s32(-by))};
}
static inline w8 w8_left(w8 x, int by) {
    return (w8){vshlq_u32(x.a, vdupq_n_s32(by)), vshlq_u32(x.b, vdupq_n_s32(by))};
}
static inline w8 w8_nearest(v8 x) { return (w8){vcvtnq_u32_f32(x.a), vcvtnq_u32_f32(x.b)}; }
static inline v8 w8_float(w8 x) { return (v8){vcvtq_f32_u32(x.a), vcvtq_f32_u32(x.b)}; }
static inline w8 w8_load_bytes(const uint8_t *p) {
    uint16x8_t half = vmovl_u8(vld1_u8(p));
    return (w8){vmovl_u16(vget_low_u16(half)), vmovl_u16(vget_high_u16(half))};
}
static inline void w8_store_bytes(uint8_t *p, w8 x) {
    vst1_u8(p, vmovn_u16(vcombine_u16(vmovn_u32(x.a), vmovn_u32(x.b))));
}

#else
typedef struct { uint32_t lane[8]; } w8;

static inline w8 w8_all(uint32_t a) { w8 r; EACH r.lane[i] = a; return r; }
static inline w8 w8_from(uint32_t a) { w8 r; EACH r.lane[i] = a + (uint32_t)i; return r; }
static inline w8 w8_add(w8 a, w8 b) { EACH a.lane[i] += b.lane[i]; return a; }
static inline w8 w8_mul(w8 a, w8 b) { EACH a.lane[i] *= b.lane[i]; return a; }
static inline w8 w8_xor(w8 a, w8 b) { EACH a.lane[i] ^= b.lane[i]; return a; }
static inline w8 w8_and(w8 a, w8 b) { EACH a.lane[i] &= b.lane[i]; return a; }
static inline w8 w8_or(w8 a, w8 b) { EACH a.lane[i] |= b.lane[i]; return a; }
static inline w8 w8_least(w8 a, w8 b) { EACH a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; return a; }
static inline w8 w8_right(w8 a, int by) { EACH a.lane[i] >>= by; return a; }
static inline w8 w8_left(w8 a, int by) { EACH a.lane[i] <<= by; return a; }
static inline w8 w8_nearest(v8 a) {
    w8 r;
    EACH {
        uint32_t whole = (uint32_t)a.lane[i];
        float rest = a.lane[i] - (float)whole;
        r.lane[i] = whole + (uint32_t)((rest > 0.5f) | ((rest == 0.5f) & (whole & 1)));
    }
    return r;
}
static inline v8 w8_float(w8 a) { v8 r; EACH r.lane[i] = (float)a.lane[i]; return r; }
static inline w8 w8_load_bytes(const uint8_t *p) { w8 r; EACH r.lane[i] = p[i]; return r; }
static inline void w8_store_bytes(uint8_t *p, w8 a) { EACH p[i] = (uint8_t)a.lane[i]; }
#endif

#endif
