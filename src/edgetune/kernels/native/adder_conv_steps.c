/* A quantized adder layer whole: floats in, floats out. Filters are in groups, each with a step of its own.
 *
 * The map is brought to bytes once a group, whole steps from 0 to `top`, framed by its padding. What lies beyond `top`
 * is the same for all filters of a group: it is summed over channels on the way, and then over windows. The sums of
 * absolute differences are those of adder_conv_u8.c, and every filter's answer goes to its own channel. */
#include "adder.h"
#include "quad.h"

enum { BLOCK_BYTES = 1 << 17 };  /* of answers, to stay in the cache */

typedef struct {
    const layer *l;
    const float *x, *step, *shift;
    const uint8_t *filters;
    const int32_t *members;
    const int64_t *sizes;  /* filters of each group */
    float *y, *over, *more;  /* over: framed like a map of one channel; NULL where what lies beyond is dropped */
    uint8_t *map;
    int64_t groups, room, framed, pixels;  /* framed: pixels of a framed map */
    int64_t strips, tiles, block;          /* block: tiles of it */
    float top;
    runs runs;
} steps;

/* One pixel as bytes; lanes of what it returns add up to what lies beyond the last step, which a NaN stays. */
static inline v8 step_pixel(const float *x, uint8_t *to, int64_t c, v8 inverse, v8 top) {
    v8 over = v8_all(0);
    for (int64_t k = 0; k < c; k += LANES) {
        v8 counted = v8_mul(k + LANES <= c ? v8_load(x + k) : part_load(x + k, (int)(c - k)), inverse);
        v8 within = v8_least(top, counted);  /* in this order, a NaN goes through */
        over = v8_add(over, v8_less(counted, within));
        v8_near(to + k, within);
    }
    return over;
}

/* So many pixels, eight at a time, so that their lanes are added up together. */
static void step_pixels(const steps *s, int64_t group, const float *x, uint8_t *to, float *over, int64_t pixels) {
    v8 inverse = v8_all(1 / s->step[group]), top = v8_all(s->top), lanes[LANES];
    for (int64_t k = 0; k < pixels; k += LANES) {
        int64_t some = least(LANES, pixels - k), c = s->l->c;
        for (int64_t i = 0; i < some; i++)
            lanes[i] = step_pixel(x + (k + i) * c, to + (k + i) * s->room, c, inverse, top);
        if (!over) continue;
        for (int64_t i = some; i < LANES; i++) lanes[i] = v8_all(0);
        v8_transpose(lanes);
        for (int i = 1; i < LANES; i++) lanes[0] = v8_add(lanes[0], lanes[i]);
        part_store(over + k, lanes[0], (int)some);
    }
}

static void step_row(const steps *s, int64_t group, int64_t row, const float *x) {
    const layer *l = s->l;
    int64_t at = group * s->framed + row * columns_of(l);
    uint8_t *to = s->map + at * s->room;
    float *over = s->over ? s->over + at : NULL;
    if (x == NULL) {
        memset(to, 0, (size_t)(columns_of(l) * s->room));
        if (over) memset(over, 0, (size_t)columns_of(l) * sizeof *over);
        return;
    }
    memset(to, 0, (size_t)(l->left * s->room));
    memset(to + (l->left + l->w) * s->room, 0, (size_t)(l->right * s->room));
    if (over) {
        memset(over, 0, (size_t)l->left * sizeof *over);
        memset(over + l->left + l->w, 0, (size_t)l->right * sizeof *over);
    }
    step_pixels(s, group, x, to + l->left * s->room, over ? over + l->left : NULL, l->w);
}

/* Items are rows of the framed map. */
static void step_rows(const void *job, int64_t begin, int64_t end) {
    const steps *s = job;
    const layer *l = s->l;
    for (int64_t row = begin; row < end; row++) {
        int64_t at = row % rows_of(l) - l->top, sample = row / rows_of(l);
        const float *x = at < 0 || at >= l->h ? NULL : s->x + (sample * l->h + at) * l->w * l->c;
        for (int64_t group = 0; group < s->groups; group++) step_row(s, group, row, x);
    }
}

/* What lies beyond under every window; items are output rows of all groups. */
static void sum_windows(const void *job, int64_t begin, int64_t end) {
    const steps *s = job;
    const layer *l = s->l;
    for (int64_t row = begin; row < end; row++) {
        int64_t p = row % l->p, sample = row / l->p;  /* of all groups' samples */
        float *to = s->more + row * l->q;
        memset(to, 0, (size_t)l->q * sizeof *to);
        for (int64_t u = 0; u < l->u; u++)
            for (int64_t v = 0; v < l->v; v++) {
                int64_t line = sample * rows_of(l) + p * l->stride_h + u * l->dil_h;
                const float *from = s->over + line * columns_of(l) + v * l->dil_w;
                if (l->stride_w == 1)
                    for (int64_t q = 0; q < l->q; q++) to[q] += from[q];
                else
                    for (int64_t q = 0; q < l->q; q++) to[q] += from[q * l->stride_w];
            }
    }
}

/* Up to eight filters of a group, the first of all filters being `first`, and the channels they answer in. */
typedef struct {
    const steps *s;
    const uint8_t *map, *w;
    const float *more;
    v8 scale, shift;
    int64_t count, channels[2 * QUAD];
} strip;

/* `at` counts through the strips of all groups. A member that is no channel answers in one that is. */
static strip strip_of(const steps *s, int64_t at) {
    int64_t group = 0, first = 0, quad = 0;
    for (; at >= pieces(s->sizes[group], 2 * QUAD); group++) {
        at -= pieces(s->sizes[group], 2 * QUAD);
        first += s->sizes[group];
        quad += pieces(s->sizes[group], QUAD);
    }
    first += at * 2 * QUAD;
    strip made = {.s = s, .map = s->map + group * s->framed * s->room,
                  .w = s->filters + (quad + at * 2) * taps_of(s->l) * s->room * QUAD,
                  .more = s->over ? s->more + group * s->pixels : NULL, .scale = v8_all(-s->step[group]),
                  .count = least(s->sizes[group] - at * 2 * QUAD, 2 * QUAD)};
    made.shift = load8(s->shift + first, (int)made.count);
    for (int64_t k = 0; k < made.count; k++)
        made.channels[k] = least((uint32_t)s->members[first + k], s->l->o - 1);
    return made;
}

static inline void put_members(const strip *one, int64_t pixel, const quad_sums *acc) {
    v8 sum = v8_add(quads_float(acc[0], acc[1]), v8_all(one->more ? one->more[pixel] : 0));
    float lanes[2 * QUAD], *to = one->s->y + pixel * one->s->l->o;
    v8_store(lanes, v8_fma(one->scale, sum, one->shift));
    for (int64_t k = 0; k < one->count; k++) to[one->channels[k]] = lanes[k];
}

/* A strip meets so many tiles of pixels. */
static inline __attribute__((always_inline)) void meet_tiles(const strip *one, int64_t tile, int64_t end, int quads) {
    const steps *s = one->s;
    int64_t next = taps_of(s->l) * s->room * QUAD;
    place here = place_of(s->l, tile * PIXELS_U8, s->room);
    for (; tile < end; tile++) {
        int64_t pixel = tile * PIXELS_U8, count = least(PIXELS_U8, s->pixels - pixel);
        const uint8_t *x[PIXELS_U8];
        for (int64_t k = 0; k < PIXELS_U8; k++) {
            x[k] = one->map + here.at;
            if (k < count - 1 || count == PIXELS_U8) step(s->l, &here, s->room);
        }
        quad_sums acc[PIXELS_U8 * 2];
        for (int k = 0; k < PIXELS_U8 * 2; k++) acc[k] = quad_none();
        meet_quads(acc, x, s->runs, one->w, next, quads);
        quad_sums copy[PIXELS_U8 * 2];  /* the sums themselves stay in registers */
        for (int k = 0; k < PIXELS_U8 * 2; k++) copy[k] = acc[k];
        for (int64_t k = 0; k < count; k++) put_members(one, pixel + k, copy + k * 2);
    }
}

/* Items are (block of tiles, strip). A block's answers stay near while all strips write to them. */
static void add_steps(const void *job, int64_t begin, int64_t end) {
    const steps *s = job;
    for (int64_t item = begin; item < end; item++) {
        int64_t tile = item / s->strips * s->block, last = least(tile + s->block, s->tiles);
        strip one = strip_of(s, item % s->strips);
        if (one.count > QUAD) meet_tiles(&one, tile, last, 2);
        else meet_tiles(&one, tile, last, 1);
    }
}

/* None of the sizes is 0. sizes: those of `layer`, the last step, whether what lies beyond counts, how many groups,
 * and the filters of each. map: groups framed maps of bytes; beyond: as many of one float a pixel, and groups answers
 * of one channel. */
void et_adder_conv_steps_f32(const float *x, const uint8_t *filters, const int32_t *members, const float *step,
                             const float *shift, float *y, uint8_t *map, float *beyond, const int64_t *sizes,
                             int threads) {
    layer l;
    memcpy(&l, sizes, sizeof l);
    const int64_t *rest = sizes + sizeof l / sizeof *sizes;
    int64_t groups = rest[2], room = pieces(l.c, OCTET) * OCTET, framed = l.n * rows_of(&l) * columns_of(&l);
    int64_t pixels = l.n * l.p * l.q, strips = 0;
    for (int64_t g = 0; g < groups; g++) strips += pieces(rest[3 + g], 2 * QUAD);
    steps s = {.l = &l, .x = x, .step = step, .shift = shift, .filters = filters, .members = members, .sizes = rest + 3,
               .y = y, .over = rest[1] ? beyond : NULL, .more = beyond + groups * framed, .map = map, .groups = groups,
               .room = room, .framed = framed, .pixels = pixels, .strips = strips, .tiles = pieces(pixels, PIXELS_U8),
               .block = pieces(BLOCK_BYTES, PIXELS_U8 * l.o * (int64_t)sizeof *y), .top = (float)rest[0],
               .runs = runs_of(&l, room, room)};
    et_parallel(step_rows, &s, l.n * rows_of(&l), groups * framed * room * 2, threads);
    if (s.over) et_parallel(sum_windows, &s, groups * l.n * l.p, groups * pixels * taps_of(&l), threads);
    et_parallel(add_steps, &s, strips * pieces(s.tiles, s.block),
                pixels * l.o * room * taps_of(&l) / DIFFERENCES_PER_BYTE / 4, threads);
}
