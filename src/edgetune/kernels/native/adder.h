/* What the adder convolutions share: the layer's sizes, a map framed by its padding, filters laid out for lanes.
 *
 * Maps lie channels last. A framed map holds its padding too, so that no tap of any output pixel needs a check. */
#ifndef EDGETUNE_ADDER_H
#define EDGETUNE_ADDER_H

#include "simd.h"
#include "threads.h"

/* a - b, and sum - |a - b|, lane by lane; a NaN stays one. */
#if defined(__AVX2__) && !defined(ET_PLAIN)
#ifdef __FMA__  /* the same numbers as a subtraction, from units that would stand idle */
static inline v8 v8_less(v8 a, v8 b) { return _mm256_fnmadd_ps(b, _mm256_set1_ps(1), a); }
#else
static inline v8 v8_less(v8 a, v8 b) { return _mm256_sub_ps(a, b); }
#endif
static inline v8 v8_less_distance(v8 sum, v8 a, v8 b) {
    return v8_less(sum, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_sub_ps(a, b)));
}
#elif defined(__aarch64__) && !defined(ET_PLAIN)
static inline v8 v8_less(v8 x, v8 y) { return (v8){vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
static inline v8 v8_less_distance(v8 sum, v8 x, v8 y) {
    return (v8){vsubq_f32(sum.a, vabdq_f32(x.a, y.a)), vsubq_f32(sum.b, vabdq_f32(x.b, y.b))};
}
#else
static inline v8 v8_less(v8 a, v8 b) { EACH a.lane[i] -= b.lane[i]; return a; }
static inline v8 v8_less_distance(v8 sum, v8 a, v8 b) {
    EACH sum.lane[i] -= __builtin_fabsf(a.lane[i] - b.lane[i]);
    return sum;
}
#endif

enum { LANES = 8, DIFFERENCES_PER_BYTE = 4 };  /* what is worth a thread is told in bytes */

typedef struct {
    int64_t n, c, h, w, o, u, v, p, q, stride_h, stride_w, top, left, bottom, right, dil_h, dil_w, groups;
} layer;

static inline int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }
static inline int64_t taps_of(const layer *l) { return l->u * l->v; }
static inline int64_t rows_of(const layer *l) { return l->top + l->h + l->bottom; }
static inline int64_t columns_of(const layer *l) { return l->left + l->w + l->right; }

/* One channel in and one out for every group: channels are the lanes of both sides. */
static inline int channelwise(const layer *l) { return l->groups > 1 && l->groups == l->c && l->groups == l->o; }

/* A walk over the output pixels of all samples: where in the framed map the next one's window begins. */
typedef struct { int64_t p, q, at; } place;

/* Groups of filters, cut into strips that fit into the registers; pixels, cut into tiles. */
typedef struct { int64_t group_step, pixels, strips, tiles; } cuts;

enum { MOST_PIXELS = 8 };

static inline place place_of(const layer *l, int64_t pixel, int64_t room) {
    int64_t q = pixel % l->q, p = pixel / l->q % l->p, sample = pixel / l->q / l->p;
    int64_t row = sample * rows_of(l) + p * l->stride_h;
    return (place){p, q, (row * columns_of(l) + q * l->stride_w) * room};
}

/* `room`: elements of a pixel in the framed map. */
static inline void step(const layer *l, place *here, int64_t room) {
    here->at += l->stride_w * room;
    if (++here->q < l->q) return;
    here->q = 0;
    here->at += (l->stride_h * columns_of(l) - l->q * l->stride_w) * room;
    if (++here->p < l->p) return;
    here->p = 0;
    here->at += (rows_of(l) - l->p * l->stride_h) * columns_of(l) * room;
}

/* Calls meet(job, group, strip, first pixel, count, windows) for the items (group, strip, tile) from `begin` on:
 * `windows` are the places in the map of `size` pixels, and beyond the last pixel it stands again, for nobody. */
static inline __attribute__((always_inline)) void each_tile(
    const layer *l, const cuts *cut, int64_t room, int64_t size, int64_t begin, int64_t end, const void *job,
    void (*meet)(const void *, int64_t, int64_t, int64_t, int64_t, const int64_t *)) {
    int64_t tile = begin % cut->tiles, strip = begin / cut->tiles % cut->strips;
    int64_t group = begin / cut->tiles / cut->strips, windows[MOST_PIXELS];
    place here = place_of(l, tile * size, room);
    for (int64_t item = begin; item < end; item++) {
        int64_t count = least(size, cut->pixels - tile * size);
        for (int64_t k = 0; k < size; k++) {
            windows[k] = here.at + group * cut->group_step;
            if (k < count - 1 || count == size) step(l, &here, room);
        }
        meet(job, group, strip, tile * size, count, windows);
        if (++tile < cut->tiles) continue;
        tile = 0;
        here = (place){0, 0, 0};
        if (++strip < cut->strips) continue;
        strip = 0;
        group++;
    }
}

/* Runs of elements that lie side by side in the map under one window: a row of taps, or one tap alone. */
typedef struct { int64_t rows, columns, row_step, column_step, length; } runs;

static inline runs runs_of(const layer *l, int64_t room, int64_t length) {
    int together = l->dil_w == 1 && length == room;
    return (runs){l->u, together ? 1 : l->v, l->dil_h * columns_of(l) * room, l->dil_w * room,
                  together ? l->v * length : length};
}

#endif
