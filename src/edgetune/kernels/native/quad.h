/* Sums of absolute differences of bytes: 4 filters of 8 channels at a time, 32 bytes, met by one pixel's 8 channels.
 *
 * quad_sums holds a sum a filter, each below 2^31. */
#ifndef EDGETUNE_QUAD_H
#define EDGETUNE_QUAD_H

#include "simd.h"

enum { QUAD = 4, OCTET = 8, QUAD_BYTES = 32 };

#if defined(__AVX2__) && !defined(ET_PLAIN)
typedef __m256i quad_sums, quad_filters, octet;
static inline quad_sums quad_none(void) { return _mm256_setzero_si256(); }
static inline quad_filters quad_load(const uint8_t *w) { return _mm256_loadu_si256((const __m256i *)(const void *)w); }
static inline octet octet_load(const uint8_t *x) {
    int64_t eight;
    memcpy(&eight, x, sizeof eight);
    return _mm256_set1_epi64x(eight);
}
static inline quad_sums quad_add(quad_sums sum, quad_filters w, octet x) {
    return _mm256_add_epi32(sum, _mm256_sad_epu8(w, x));
}
static inline __m256i quads_whole(quad_sums a, quad_sums b) {
    __m256 evens = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(evens), 0xd8);
}
static inline void quads_store(int32_t *to, quad_sums a, quad_sums b) {
    _mm256_storeu_si256((__m256i *)(void *)to, quads_whole(a, b));
}
static inline v8 quads_float(quad_sums a, quad_sums b) { return _mm256_cvtepi32_ps(quads_whole(a, b)); }
#elif defined(__aarch64__) && !defined(ET_PLAIN)
typedef struct { uint32x4_t a, b; } quad_sums;
typedef struct { uint8x16_t a, b; } quad_filters;
typedef uint8x16_t octet;
static inline quad_sums quad_none(void) { return (quad_sums){vdupq_n_u32(0), vdupq_n_u32(0)}; }
static inline quad_filters quad_load(const uint8_t *w) { return (quad_filters){vld1q_u8(w), vld1q_u8(w + 16)}; }
static inline octet octet_load(const uint8_t *x) {
    uint8x8_t eight = vld1_u8(x);
    return vcombine_u8(eight, eight);
}
static inline quad_sums quad_add(quad_sums sum, quad_filters w, octet x) {
    return (quad_sums){vpadalq_u16(sum.a, vpaddlq_u8(vabdq_u8(w.a, x))),
                       vpadalq_u16(sum.b, vpaddlq_u8(vabdq_u8(w.b, x)))};
}
static inline void quads_store(int32_t *to, quad_sums a, quad_sums b) {
    vst1q_s32(to, vreinterpretq_s32_u32(vpaddq_u32(a.a, a.b)));
    vst1q_s32(to + QUAD, vreinterpretq_s32_u32(vpaddq_u32(b.a, b.b)));
}
static inline v8 quads_float(quad_sums a, quad_sums b) {
    return (v8){vcvtq_f32_u32(vpaddq_u32(a.a, a.b)), vcvtq_f32_u32(vpaddq_u32(b.a, b.b))};
}
#else
typedef struct { int32_t sum[QUAD]; } quad_sums;
typedef const uint8_t *quad_filters;
typedef const uint8_t *octet;
static inline quad_sums quad_none(void) { return (quad_sums){{0, 0, 0, 0}}; }
static inline quad_filters quad_load(const uint8_t *w) { return w; }
static inline octet octet_load(const uint8_t *x) { return x; }
static inline quad_sums quad_add(quad_sums sum, quad_filters w, octet x) {
    for (int f = 0; f < QUAD; f++)
        for (int k = 0; k < OCTET; k++) {
            int32_t apart = (int32_t)x[k] - (int32_t)w[f * OCTET + k];
            sum.sum[f] += apart < 0 ? -apart : apart;
        }
    return sum;
}
static inline void quads_store(int32_t *to, quad_sums a, quad_sums b) {
    memcpy(to, a.sum, sizeof a.sum);
    memcpy(to + QUAD, b.sum, sizeof b.sum);
}
static inline v8 quads_float(quad_sums a, quad_sums b) {
    v8 r;
    for (int f = 0; f < QUAD; f++) {
        r.lane[f] = (float)a.sum[f];
        r.lane[QUAD + f] = (float)b.sum[f];
    }
    return r;
}
#endif

#endif
