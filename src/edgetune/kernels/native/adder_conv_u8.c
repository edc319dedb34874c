/* The adder convolution of bytes, as integers: y[o, l] = sum over taps and channels of |x - w|.
 *
 * A few pixels meet 8 filters (or the last 4) at a time, 8 channels in one instruction. Filters come laid out:
 * (group, quad of filters, tap, octet of channels, 4 filters, 8 channels), filled up with 0, as is the framed map. */
#include "adder.h"
#include "quad.h"

enum { PIXELS_U8 = 6 };

typedef struct {
    const layer *l;
    const uint8_t *x, *filters;
    int32_t *y;
    int64_t room, quads;  /* of a group: bytes of a pixel, quads of filters; a strip has two */
    cuts cuts;
    runs runs;
} sads;

static inline __attribute__((always_inline)) void meet_quads(quad_sums acc[PIXELS_U8 * 2],
                                                             const uint8_t *const x[PIXELS_U8], runs r,
                                                             const uint8_t *w, int64_t next, int quads) {
    for (int64_t u = 0; u < r.rows; u++)
        for (int64_t v = 0; v < r.columns; v++) {
            int64_t at = u * r.row_step + v * r.column_step;
            const uint8_t *from[PIXELS_U8];
            for (int i = 0; i < PIXELS_U8; i++) from[i] = x[i] + at;
            for (int64_t k = 0; k < r.length; k += OCTET, w += QUAD_BYTES) {
                quad_filters few[2] = {quad_load(w), quad_load(quads == 2 ? w + next : w)};
                for (int i = 0; i < PIXELS_U8; i++) {
                    octet values = octet_load(from[i] + k);
                    for (int j = 0; j < quads; j++) acc[i * 2 + j] = quad_add(acc[i * 2 + j], few[j], values);
                }
            }
        }
}

/* The sums of up to eight filters, from `filter` on, of one pixel. */
static inline void put_quads(const sads *s, int64_t pixel, int64_t filter, const quad_sums *acc, int64_t count) {
    int32_t lanes[2 * QUAD], *to = s->y + pixel * s->l->o + filter;
    if (count == 2 * QUAD) {
        quads_store(to, acc[0], acc[1]);
        return;
    }
    quads_store(lanes, acc[0], acc[1]);
    memcpy(to, lanes, (size_t)count * sizeof *lanes);
}

/* One strip of filters meets one tile of pixels. */
static inline __attribute__((always_inline)) void add_tile_u8(const void *job, int64_t group, int64_t strip,
                                                              int64_t pixel, int64_t count, const int64_t *windows) {
    const sads *s = job;
    const layer *l = s->l;
    int64_t filters = l->o / l->groups, next = taps_of(l) * s->room * QUAD, first = strip * 2 * QUAD;
    int64_t rest = least(filters - first, 2 * QUAD);
    const uint8_t *x[PIXELS_U8], *w = s->filters + (group * s->quads + strip * 2) * next;
    for (int k = 0; k < PIXELS_U8; k++) x[k] = s->x + windows[k];
    quad_sums acc[PIXELS_U8 * 2];
    for (int k = 0; k < PIXELS_U8 * 2; k++) acc[k] = quad_none();
    if (rest > QUAD) meet_quads(acc, x, s->runs, w, next, 2);
    else meet_quads(acc, x, s->runs, w, next, 1);
    first += group * filters;
    if (count == PIXELS_U8 && rest == 2 * QUAD) {
        for (int k = 0; k < PIXELS_U8; k++) put_quads(s, pixel + k, first, acc + k * 2, 2 * QUAD);
        return;
    }
    quad_sums copy[PIXELS_U8 * 2];  /* the sums themselves stay in registers */
    for (int k = 0; k < PIXELS_U8 * 2; k++) copy[k] = acc[k];
    for (int64_t k = 0; k < count; k++) put_quads(s, pixel + k, first, copy + k * 2, rest);
}

/* Items are (group, strip of filters, tile of pixels). */
static void add_sads(const void *job, int64_t begin, int64_t end) {
    const sads *s = job;
    each_tile(s->l, &s->cuts, s->l->groups * s->room, PIXELS_U8, begin, end, job, add_tile_u8);
}

/* None of the sizes is 0. sizes: those of `layer`, then the value of the padding. scratch: the framed map. */
void et_adder_conv_u8_f32(const uint8_t *x, const uint8_t *filters, int32_t *y, uint8_t *scratch,
                          const int64_t *sizes, int threads) {
    layer l;
    memcpy(&l, sizes, sizeof l);
    int64_t i = l.c / l.groups, o = l.o / l.groups, pixels = l.n * l.p * l.q, room = pieces(i, OCTET) * OCTET;
    const uint8_t *map = framed(&l, x, scratch, i, room, (int)sizes[sizeof l / sizeof *sizes], threads);
    int64_t quads = pieces(o, QUAD);
    sads s = {&l, map, filters, y, room, quads,
              {room, pixels, pieces(quads, 2), pieces(pixels, PIXELS_U8)}, runs_of(&l, l.groups * room, room)};
    et_parallel(add_sads, &s, l.groups * s.cuts.strips * s.cuts.tiles, pixels * l.o * room * taps_of(&l) / DIFFERENCES_PER_BYTE / 4,
                threads);
}
