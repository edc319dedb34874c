/* Eight floats at a time: AVX2 (with AVX-512VL masks where there are), NEON, or plain C (also with -DET_PLAIN).
 *
 * part_* read or write the first `count` (0..8) lanes only; lanes beyond are 0. Bit i of a mask byte is lane i. */
#ifndef EDGETUNE_SIMD_H
#define EDGETUNE_SIMD_H

#include "element.h"

#if defined(__AVX2__) && !defined(ET_PLAIN)
#include <immintrin.h>
typedef __m256 v8;

static inline v8 v8_all(float f) { return _mm256_set1_ps(f); }
static inline v8 v8_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v8_store(float *p, v8 a) { _mm256_storeu_ps(p, a); }
static inline v8 v8_add(v8 a, v8 b) { return _mm256_add_ps(a, b); }
static inline v8 v8_mul(v8 a, v8 b) { return _mm256_mul_ps(a, b); }
static inline v8 v8_least(v8 a, v8 b) { return _mm256_min_ps(a, b); }
static inline v8 v8_most(v8 a, v8 b) { return _mm256_max_ps(a, b); }
#ifdef __FMA__
static inline v8 v8_fma(v8 a, v8 b, v8 c) { return _mm256_fmadd_ps(a, b, c); }
#else
static inline v8 v8_fma(v8 a, v8 b, v8 c) { return _mm256_add_ps(_mm256_mul_ps(a, b), c); }
#endif
/* Eight rows of eight: rows become columns. */
static inline void v8_transpose(v8 r[8]) {
    v8 t[8], u[8];
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}
/* Lane i of the result is lane at[i] of a. */
static inline v8 v8_pick(v8 a, const int32_t *at) {
    return _mm256_permutevar8x32_ps(a, _mm256_loadu_si256((const __m256i *)(const void *)at));
}
/* a0+a1 a2+a3 a4+a5 a6+a7 b0+b1 b2+b3 b4+b5 b6+b7 */
static inline v8 v8_pairs(v8 a, v8 b) {
    __m256d mixed = _mm256_castps_pd(_mm256_hadd_ps(a, b));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(mixed, 0xd8));
}
/* a0 a2 a4 a6 b0 b2 b4 b6 */
static inline v8 v8_evens(v8 a, v8 b) {
    __m256d mixed = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(mixed, 0xd8));
}
/* a0 a0 a1 a1 a2 a2 a3 a3, and the same of a4..a7 */
static inline void v8_twice(v8 a, v8 *low, v8 *high) {
    *low = _mm256_permutevar8x32_ps(a, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    *high = _mm256_permutevar8x32_ps(a, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
}
static inline void v8_as_bytes(uint8_t *p, __m256i whole) {
    __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packus_epi16(half, half));
}
/* Whole numbers 0..255 as bytes. */
static inline void v8_bytes(uint8_t *p, v8 a) { v8_as_bytes(p, _mm256_cvttps_epi32(a)); }
/* Numbers up to 255 as bytes: the nearest, half to even; 0 for those below, and for a NaN. */
static inline void v8_near(uint8_t *p, v8 a) { v8_as_bytes(p, _mm256_cvtps_epi32(a)); }
/* Lane by lane, v and its position take over where v is larger or NaN, or where nothing stood yet (below 0). */
static inline void v8_challenge(v8 *best, v8 *where, v8 v, v8 position) {
    v8 larger = _mm256_or_ps(_mm256_cmp_ps(v, *best, _CMP_GT_OQ), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    v8 wins = _mm256_or_ps(larger, _mm256_cmp_ps(*where, _mm256_setzero_ps(), _CMP_LT_OQ));
    *best = _mm256_blendv_ps(*best, v, wins);
    *where = _mm256_blendv_ps(*where, position, wins);
}
static inline v8 v8_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline __m256i v8_lanes(unsigned mask) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)mask), bit), bit);
}
#ifdef __AVX512VL__
static inline v8 v8_keep(v8 a, unsigned mask) { return _mm256_maskz_mov_ps((__mmask8)mask, a); }
static inline unsigned v8_inside(v8 a, v8 low, v8 high) {
    return _mm256_cmp_ps_mask(a, low, _CMP_GT_OQ) & _mm256_cmp_ps_mask(a, high, _CMP_LT_OQ);
}
static inline v8 part_load(const float *p, int count) {
    return _mm256_maskz_loadu_ps((__mmask8)((1u << count) - 1), p);
}
static inline void part_store(float *p, v8 a, int count) {
    _mm256_mask_storeu_ps(p, (__mmask8)((1u << count) - 1), a);
}
#else
static inline v8 v8_keep(v8 a, unsigned mask) { return _mm256_and_ps(a, _mm256_castsi256_ps(v8_lanes(mask))); }
static inline unsigned v8_inside(v8 a, v8 low, v8 high) {
    __m256 in = _mm256_and_ps(_mm256_cmp_ps(a, low, _CMP_GT_OQ), _mm256_cmp_ps(a, high, _CMP_LT_OQ));
    return (unsigned)_mm256_movemask_ps(in);
}
static inline v8 part_load(const float *p, int count) {
    return _mm256_maskload_ps(p, v8_lanes((1u << count) - 1));
}
static inline void part_store(float *p, v8 a, int count) {
    if (count >= 8) { v8_store(p, a); return; }
    __m128 rest = _mm256_castps256_ps128(a);
    if (count & 4) { _mm_storeu_ps(p, rest); rest = _mm256_extractf128_ps(a, 1); p += 4; }
    if (count & 2) { _mm_storel_pi((__m64 *)(void *)p, rest); rest = _mm_movehl_ps(rest, rest); p += 2; }
    if (count & 1) _mm_store_ss(p, rest);
}
#endif

#elif defined(__aarch64__) && !defined(ET_PLAIN)
#include <arm_neon.h>
typedef struct { float32x4_t a, b; } v8;

static inline v8 v8_all(float f) { return (v8){vdupq_n_f32(f), vdupq_n_f32(f)}; }
static inline v8 v8_load(const float *p) { return (v8){vld1q_f32(p), vld1q_f32(p + 4)}; }
static inline void v8_store(float *p, v8 x) { vst1q_f32(p, x.a); vst1q_f32(p + 4, x.b); }
static inline v8 v8_add(v8 x, v8 y) { return (v8){vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
static inline v8 v8_mul(v8 x, v8 y) { return (v8){vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
static inline v8 v8_least(v8 x, v8 y) { return (v8){vminq_f32(x.a, y.a), vminq_f32(x.b, y.b)}; }
static inline v8 v8_most(v8 x, v8 y) { return (v8){vmaxq_f32(x.a, y.a), vmaxq_f32(x.b, y.b)}; }
static inline v8 v8_fma(v8 x, v8 y, v8 z) { return (v8){vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
#define ET_MOVES_BY_COPY
static inline v8 v8_pairs(v8 x, v8 y) { return (v8){vpaddq_f32(x.a, x.b), vpaddq_f32(y.a, y.b)}; }
static inline void v8_twice(v8 x, v8 *low, v8 *high) {
    *low = (v8){vzip1q_f32(x.a, x.a), vzip2q_f32(x.a, x.a)};
    *high = (v8){vzip1q_f32(x.b, x.b), vzip2q_f32(x.b, x.b)};
}
static inline v8 v8_evens(v8 x, v8 y) { return (v8){vuzp1q_f32(x.a, x.b), vuzp1q_f32(y.a, y.b)}; }
static inline void v8_bytes(uint8_t *p, v8 x) {
    uint16x8_t half = vcombine_u16(vmovn_u32(vcvtq_u32_f32(x.a)), vmovn_u32(vcvtq_u32_f32(x.b)));
    vst1_u8(p, vmovn_u16(half));
}
static inline void v8_near(uint8_t *p, v8 x) {
    uint16x8_t half = vcombine_u16(vmovn_u32(vcvtnq_u32_f32(x.a)), vmovn_u32(vcvtnq_u32_f32(x.b)));
    vst1_u8(p, vmovn_u16(half));
}
static inline void v4_challenge(float32x4_t *best, float32x4_t *where, float32x4_t v, float32x4_t position) {
    uint32x4_t larger = vorrq_u32(vcgtq_f32(v, *best), vmvnq_u32(vceqq_f32(v, v)));
    uint32x4_t wins = vorrq_u32(larger, vcltq_f32(*where, vdupq_n_f32(0)));
    *best = vbslq_f32(wins, v, *best);
    *where = vbslq_f32(wins, position, *where);
}
static inline void v8_challenge(v8 *best, v8 *where, v8 v, v8 position) {
    v4_challenge(&best->a, &where->a, v.a, position.a);
    v4_challenge(&best->b, &where->b, v.b, position.b);
}
static inline v8 v8_bf16(const uint16_t *p) {
    uint16x8_t half = vld1q_u16(p);
    return (v8){vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)),
                vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(half), 16))};
}
static inline v8 v8_keep(v8 x, unsigned mask) {
    const uint32x4_t low = {1, 2, 4, 8}, high = {16, 32, 64, 128}, m = vdupq_n_u32(mask);
    return (v8){vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x.a), vtstq_u32(m, low))),
                vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x.b), vtstq_u32(m, high)))};
}
static inline unsigned v8_inside(v8 x, v8 low, v8 high) {
    const uint32x4_t first = {1, 2, 4, 8}, last = {16, 32, 64, 128};
    uint32x4_t a = vandq_u32(vcgtq_f32(x.a, low.a), vcltq_f32(x.a, high.a));
    uint32x4_t b = vandq_u32(vcgtq_f32(x.b, low.b), vcltq_f32(x.b, high.b));
    return vaddvq_u32(vorrq_u32(vandq_u32(a, first), vandq_u32(b, last)));
}
#define ET_PART_BY_COPY

#else
typedef struct { float lane[8]; } v8;
#define EACH for (int i = 0; i < 8; i++)

static inline v8 v8_all(float f) { v8 r; EACH r.lane[i] = f; return r; }
static inline v8 v8_load(const float *p) { v8 r; EACH r.lane[i] = p[i]; return r; }
static inline void v8_store(float *p, v8 a) { EACH p[i] = a.lane[i]; }
static inline v8 v8_add(v8 a, v8 b) { EACH a.lane[i] += b.lane[i]; return a; }
static inline v8 v8_mul(v8 a, v8 b) { EACH a.lane[i] *= b.lane[i]; return a; }
static inline v8 v8_least(v8 a, v8 b) { EACH a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; return a; }
static inline v8 v8_most(v8 a, v8 b) { EACH a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; return a; }
static inline v8 v8_fma(v8 a, v8 b, v8 c) { EACH c.lane[i] += a.lane[i] * b.lane[i]; return c; }
#define ET_MOVES_BY_COPY
static inline v8 v8_pairs(v8 a, v8 b) {
    v8 r;
    for (int i = 0; i < 4; i++) {
        r.lane[i] = a.lane[2 * i] + a.lane[2 * i + 1];
        r.lane[i + 4] = b.lane[2 * i] + b.lane[2 * i + 1];
    }
    return r;
}
static inline v8 v8_evens(v8 a, v8 b) {
    v8 r;
    for (int i = 0; i < 4; i++) {
        r.lane[i] = a.lane[2 * i];
        r.lane[i + 4] = b.lane[2 * i];
    }
    return r;
}
static inline void v8_twice(v8 a, v8 *low, v8 *high) {
    v8 both = a;
    EACH low->lane[i] = both.lane[i / 2];
    EACH high->lane[i] = both.lane[4 + i / 2];
}
static inline void v8_bytes(uint8_t *p, v8 a) { EACH p[i] = (uint8_t)a.lane[i]; }
static inline void v8_near(uint8_t *p, v8 a) {
    const float whole = 8388608.0f;  /* there is nothing between whole numbers above it */
    EACH p[i] = (uint8_t)(a.lane[i] > 0 ? a.lane[i] + whole - whole : 0);
}
static inline void v8_challenge(v8 *best, v8 *where, v8 v, v8 position) {
    EACH {
        float x = v.lane[i];
        int wins = (x > best->lane[i]) | (x != x) | (where->lane[i] < 0);
        best->lane[i] = wins ? x : best->lane[i];
        where->lane[i] = wins ? position.lane[i] : where->lane[i];
    }
}
static inline v8 v8_bf16(const uint16_t *p) { v8 r; EACH r.lane[i] = bf16_to_float(p[i]); return r; }
static inline v8 v8_keep(v8 a, unsigned mask) { EACH a.lane[i] = mask >> i & 1 ? a.lane[i] : 0; return a; }
static inline unsigned v8_inside(v8 a, v8 low, v8 high) {
    unsigned mask = 0;
    EACH mask |= (unsigned)((a.lane[i] > low.lane[i]) & (a.lane[i] < high.lane[i])) << i;
    return mask;
}
#define ET_PART_BY_COPY
#endif

#ifdef ET_MOVES_BY_COPY
static inline void v8_transpose(v8 r[8]) {
    float lanes[8][8], turned[8][8];
    for (int i = 0; i < 8; i++) v8_store(lanes[i], r[i]);
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) turned[i][j] = lanes[j][i];
    for (int i = 0; i < 8; i++) r[i] = v8_load(turned[i]);
}
static inline v8 v8_pick(v8 a, const int32_t *at) {
    float lanes[8], picked[8];
    v8_store(lanes, a);
    for (int i = 0; i < 8; i++) picked[i] = lanes[at[i]];
    return v8_load(picked);
}
#endif

#ifdef ET_PART_BY_COPY
static inline v8 part_load(const float *p, int count) {
    float lanes[8] = {0};
    for (int i = 0; i < count; i++) lanes[i] = p[i];
    return v8_load(lanes);
}
static inline void part_store(float *p, v8 a, int count) {
    float lanes[8];
    v8_store(lanes, a);
    for (int i = 0; i < count; i++) p[i] = lanes[i];
}
#endif

/* Sixteen floats: one register where there are such, else two of eight. */
#if defined(__AVX512F__) && !defined(ET_PLAIN)
typedef __m512 v16;
static inline v16 v16_all(float f) { return _mm512_set1_ps(f); }
static inline v16 v16_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v16_store(float *p, v16 a) { _mm512_storeu_ps(p, a); }
static inline v16 v16_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
static inline v16 v16_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
static inline v16 v16_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
static inline __mmask16 v16_lanes(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }
static inline v16 v16_part_load(const float *p, int64_t count) { return _mm512_maskz_loadu_ps(v16_lanes(count), p); }
static inline void v16_part_store(float *p, v16 a, int64_t count) { _mm512_mask_storeu_ps(p, v16_lanes(count), a); }
#else
typedef struct { v8 low, high; } v16;
static inline v16 v16_all(float f) { return (v16){v8_all(f), v8_all(f)}; }
static inline v16 v16_load(const float *p) { return (v16){v8_load(p), v8_load(p + 8)}; }
static inline void v16_store(float *p, v16 a) { v8_store(p, a.low); v8_store(p + 8, a.high); }
static inline v16 v16_add(v16 a, v16 b) { return (v16){v8_add(a.low, b.low), v8_add(a.high, b.high)}; }
static inline v16 v16_mul(v16 a, v16 b) { return (v16){v8_mul(a.low, b.low), v8_mul(a.high, b.high)}; }
static inline v16 v16_fma(v16 a, v16 b, v16 c) {
    return (v16){v8_fma(a.low, b.low, c.low), v8_fma(a.high, b.high, c.high)};
}
static inline v16 v16_part_load(const float *p, int64_t count) {
    if (count >= 16) return v16_load(p);
    return (v16){part_load(p, count < 8 ? (int)count : 8), count > 8 ? part_load(p + 8, (int)count - 8) : v8_all(0)};
}
static inline void v16_part_store(float *p, v16 a, int64_t count) {
    part_store(p, a.low, count < 8 ? (int)count : 8);
    if (count > 8) part_store(p + 8, a.high, count < 16 ? (int)count - 8 : 8);
}
#endif

/* The same for a tensor's own elements. */
static inline v8 load8(const element *p, int count) {
#ifdef ET_BF16
    if (count == 8) return v8_bf16(p);
    uint16_t lanes[8] = {0};
    for (int i = 0; i < count; i++) lanes[i] = p[i];
    return v8_bf16(lanes);
#else
    return count == 8 ? v8_load(p) : part_load(p, count);
#endif
}

static inline void store8(element *p, v8 a, int count) {
#ifdef ET_BF16
    float lanes[8];
    v8_store(lanes, a);
    for (int i = 0; i < count; i++) p[i] = float_to_bf16(lanes[i]);
#else
    if (count == 8) v8_store(p, a);
    else part_store(p, a, count);
#endif
}

static inline void bytes8(uint8_t *p, v8 a, int count) {
    if (count == 8) {
        v8_bytes(p, a);
        return;
    }
    uint8_t lanes[8];
    v8_bytes(lanes, a);
    for (int i = 0; i < count; i++) p[i] = lanes[i];
}

/* Up to eight bits from bit `at` on, reading no byte beyond those that hold them. */
static inline unsigned bits8(const uint8_t *bits, int64_t at, int count) {
    const uint8_t *byte = bits + (at >> 3);
    int shift = (int)(at & 7);
    unsigned both = byte[0];
    if (shift + count > 8) both |= (unsigned)byte[1] << 8;
    return both >> shift & ((1u << count) - 1);
}

#endif
