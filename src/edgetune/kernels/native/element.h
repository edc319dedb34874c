/* The type of a tensor's elements. A kernel file is compiled once a type: NAME(f) is f_f32 or f_bf16. */
#ifndef EDGETUNE_ELEMENT_H
#define EDGETUNE_ELEMENT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef ET_BF16
typedef uint16_t element;
#define NAME(f) f##_bf16
#else
typedef float element;
#define NAME(f) f##_f32
#endif

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float bf16_to_float(uint16_t v) {
    uint32_t wide = (uint32_t)v << 16;
    float f;
    memcpy(&f, &wide, sizeof f);
    return f;
}

/* Round to nearest, ties to even; a NaN stays a NaN. */
static inline uint16_t float_to_bf16(float f) {
    uint32_t wide;
    memcpy(&wide, &f, sizeof wide);
    if (f != f) return 0x7fc0;
    return (uint16_t)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

#ifdef ET_BF16
static inline float to_float(element v) { return bf16_to_float(v); }
static inline element from_float(float f) { return float_to_bf16(f); }
#else
static inline float to_float(element v) { return v; }
static inline element from_float(float f) { return f; }
#endif

#endif
