/* The two products of a convolution's backward pass on the grid, in groups, one value for all taps of a pair:
 *
 *   gx[i, l] = sum over o of W[o, i] m[l] g[o, l]        W: the weight summed over its taps
 *   gw[o, i] = sum over l of g[o, l] n[l] x[i, l]        written to one place, or to every tap
 *
 * l runs over the cells of all samples, with the channels outside: g (o l), x and gx (i l). m and n repeat from one
 * sample to the next. Panels of 16 columns are made ready in the first-level cache and met by a few rows at a time. */
#include "simd.h"
#include "threads.h"

/* As many rows as there are registers for: a sum each, a vector of the panel, one value. */
#if defined(__AVX512F__) && !defined(ET_PLAIN)
enum { ROWS = 8 };
#else
enum { ROWS = 6 };
#endif
enum { MOST_ROWS = 8, COLUMNS = 16, DEPTH = 256, TILE_ROWS = 480 };

typedef struct {
    const float *g, *m, *n, *x, *w;
    float *gx, *gw, *sums;
    int64_t groups, o, i, length, cells, taps;  /* o, i: channels of one group */
    int64_t w_o, w_i, w_t, gw_o, gw_i, gw_t, copies;
    int64_t row_blocks, block_rows;  /* gx: a panel's rows are cut where there are too few panels */
    int64_t weight_items;
} products;

static inline int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

static inline v8 load_part(const float *from, int64_t count) {
    return count >= 8 ? v8_load(from) : part_load(from, (int)count);
}

/* sums (group, panel of i, o, ROWS): what the rows of gx are met with, zero where a panel is short. */
static inline float *panel_of(const products *p, int64_t group, int64_t i) {
    return p->sums + ((group * parts(p->i, ROWS) + i / ROWS) * p->o) * ROWS;
}

static inline void sum_row(const products *p, int64_t row, int64_t taps, int64_t w_i, int64_t w_t) {
    int64_t group = row / p->o, o = row % p->o;
    const float *w = p->w + row * p->w_o;
    for (int64_t i = 0; i < p->i; i += ROWS) {
        float *to = panel_of(p, group, i) + o * ROWS;
        for (int64_t k = 0; k < ROWS; k++) {
            const float *pair = w + (i + k) * w_i;
            float even = 0, odd = 0;
            int64_t t = 0;
            if (i + k < p->i) {
                for (; t + 2 <= taps; t += 2) {
                    even += pair[t * w_t];
                    odd += pair[(t + 1) * w_t];
                }
                if (t < taps) even += pair[t * w_t];
            }
            to[k] = even + odd;
        }
    }
}

/* The same of a weight whose input channels lie side by side. */
static void sum_row_of_channels(const products *p, int64_t row) {
    const float *w = p->w + row * p->w_o;
    for (int64_t i = 0; i < p->i; i += ROWS) {
        float *to = panel_of(p, row / p->o, i) + row % p->o * ROWS;
        v8 sum = v8_all(0);
        for (int64_t t = 0; t < p->taps; t++) sum = v8_add(sum, load_part(w + i + t * p->w_t, least(ROWS, p->i - i)));
        part_store(to, sum, ROWS);
    }
}

/* With the number of taps constant the compiler unrolls the sum. Items are output channels. */
static void sum_taps(const void *job, int64_t begin, int64_t end) {
    const products *p = job;
    for (int64_t row = begin; row < end; row++) {
        if (p->taps == 1) sum_row(p, row, 1, p->w_i, 1);
        else if (p->taps == 9 && p->w_t == 1) sum_row(p, row, 9, 9, 1);
        else if (p->taps == 25 && p->w_t == 1) sum_row(p, row, 25, 25, 1);
        else if (p->w_i == 1) sum_row_of_channels(p, row);
        else sum_row(p, row, p->taps, p->w_i, p->w_t);
    }
}

/* acc[r] += sum over k of a[r][k] b[k], where a[r][k] lies at r * row + k * step. Far rows are reached from every
 * third one, so that the addresses fit into registers. */
static inline __attribute__((always_inline)) void meet(v16 acc[ROWS], const float *a, int64_t row, int64_t step,
                                                       const float *b, int64_t depth) {
    const float *third[] = {a, a + 3 * row, a + 6 * row};
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; k++) {
        v16 columns = v16_load(b + k * COLUMNS);
        for (int r = 0; r < ROWS; r++) {
            float value = row == 1 ? a[k * step + r] : third[r / 3][r % 3 * row];
            acc[r] = v16_fma(v16_all(value), columns, acc[r]);
        }
        for (int i = 0; i < 3; i++) third[i] += step;
    }
}

/* The factors of 16 columns from `first` on. */
static inline void factors_of(const float *table, int64_t cells, int64_t first, float out[COLUMNS]) {
    int64_t at = first % cells;
    for (int c = 0; c < COLUMNS; c++) {
        out[c] = table[at];
        if (++at == cells) at = 0;
    }
}

/* b (depth 16): columns of g times m, zero beyond the last one. */
static void ready_columns(const products *p, const float *g, int64_t first, int64_t depth, float *b) {
    int64_t count = least(COLUMNS, p->length - first);
    float factors[COLUMNS];
    if (p->m) factors_of(p->m, p->cells, first, factors);
    v16 factor = p->m ? v16_load(factors) : v16_all(1);
    for (int64_t k = 0; k < depth; k++)
        v16_store(b + k * COLUMNS, v16_mul(v16_part_load(g + k * p->length + first, count), factor));
}

/* A few rows of one panel of gx, added to what is there unless `first`. */
static inline void input_rows(const products *p, const float *sums, const float *b, int64_t depth, float *out,
                              int64_t rows, int64_t columns, int first) {
    v16 acc[ROWS];
    for (int r = 0; r < ROWS; r++) acc[r] = v16_all(0);
    meet(acc, sums, 1, ROWS, b, depth);
    for (int r = 0; r < ROWS; r++) {
        float *to = out + r * p->length;
        if (r >= rows) break;
        v16_part_store(to, first ? acc[r] : v16_add(acc[r], v16_part_load(to, columns)), columns);
    }
}

/* Items are (group, panel of columns, block of rows). */
static void input_panels(const void *job, int64_t begin, int64_t end) {
    const products *p = job;
    _Alignas(64) float b[DEPTH * COLUMNS];
    int64_t panels = parts(p->length, COLUMNS);
    for (int64_t item = begin; item < end; item++) {
        int64_t block = item % p->row_blocks, panel = item / p->row_blocks % panels;
        int64_t group = item / p->row_blocks / panels, first = panel * COLUMNS;
        int64_t top = block * p->block_rows, bottom = least(top + p->block_rows, p->i);
        int64_t columns = least(COLUMNS, p->length - first);
        for (int64_t o = 0; o < p->o; o += DEPTH) {
            int64_t depth = least(DEPTH, p->o - o);
            ready_columns(p, p->g + (group * p->o + o) * p->length, first, depth, b);
            for (int64_t i = top; i < bottom; i += ROWS)
                input_rows(p, panel_of(p, group, i) + o * ROWS, b, depth,
                           p->gx + (group * p->i + i) * p->length + first, least(ROWS, p->i - i), columns, o == 0);
        }
    }
}

/* b (depth 16): 16 rows of x turned to columns, times n; zero beyond the last row. */
static void ready_rows(const products *p, const float *x, int64_t rows, int64_t first, int64_t depth, float *b) {
    for (int64_t k = 0; k < depth; k += 8) {
        int64_t count = least(8, depth - k);
        v8 factors = v8_all(1);
        if (p->n) {
            float table[COLUMNS];
            factors_of(p->n, p->cells, first + k, table);
            factors = v8_load(table);
        }
        for (int half = 0; half < COLUMNS; half += 8) {
            v8 square[8];
            for (int r = 0; r < 8; r++)
                square[r] = half + r < rows
                    ? v8_mul(load_part(x + (half + r) * p->length + first + k, count), factors) : v8_all(0);
            v8_transpose(square);
            for (int64_t c = 0; c < count; c++) v8_store(b + (k + c) * COLUMNS + half, square[c]);
        }
    }
}

/* Where each of the 72 copies of eight values comes from, nine of each. */
static const int32_t NINEFOLD[9][8] = {
    {0, 0, 0, 0, 0, 0, 0, 0}, {0, 1, 1, 1, 1, 1, 1, 1}, {1, 1, 2, 2, 2, 2, 2, 2},
    {2, 2, 2, 3, 3, 3, 3, 3}, {3, 3, 3, 3, 4, 4, 4, 4}, {4, 4, 4, 4, 4, 5, 5, 5},
    {5, 5, 5, 5, 5, 5, 6, 6}, {6, 6, 6, 6, 6, 6, 6, 7}, {7, 7, 7, 7, 7, 7, 7, 7}};

/* One row of a tile to its place and to all of its taps; to the first alone where input channels lie side by side. */
static void put_pairs(const products *p, float *to, const float *row, int64_t count) {
    if (p->gw_i == 9 && p->copies == 9 && count == COLUMNS) {
        for (int half = 0; half < 2; half++) {
            v8 eight = v8_load(row + 8 * half);
            for (int part = 0; part < 9; part++)
                v8_store(to + 72 * half + 8 * part, v8_pick(eight, NINEFOLD[part]));
        }
    } else if (p->gw_i == 1) {
        memcpy(to, row, (size_t)count * sizeof *row);
    } else {
        for (int64_t c = 0; c < count; c++)
            for (int64_t t = 0; t < p->copies; t++) to[c * p->gw_i + t * p->gw_t] = row[c];
    }
}

/* ROWS rows of g met with a panel, added to their rows of the tile unless `first`. */
static inline void weight_rows(const float *g, int64_t row, const float *b, int64_t depth, float *out, int first) {
    v16 acc[ROWS];
    for (int r = 0; r < ROWS; r++) acc[r] = first ? v16_all(0) : v16_load(out + r * COLUMNS);
    meet(acc, g, row, 1, b, depth);
    for (int r = 0; r < ROWS; r++) v16_store(out + r * COLUMNS, acc[r]);
}

/* A tile of gw: rows from `top` on, up to 16 columns from i on. */
static void weight_tile(const products *p, int64_t group, int64_t i, int64_t top, float *tile, float *b) {
    int64_t bottom = least(top + TILE_ROWS, p->o), columns = least(COLUMNS, p->i - i);
    const float *x = p->x + (group * p->i + i) * p->length;
    for (int64_t l = 0; l < p->length; l += DEPTH) {
        int64_t depth = least(DEPTH, p->length - l);
        ready_rows(p, x, columns, l, depth, b);
        for (int64_t o = top; o < bottom; o += ROWS) {
            const float *g = p->g + (group * p->o + o) * p->length + l;
            int64_t row = p->length;
            float few[ROWS * DEPTH];
            if (bottom - o < ROWS) {  /* the last ones, with others behind them that nobody reads */
                for (int64_t r = 0; r < ROWS; r++)
                    memcpy(few + r * DEPTH, g + least(r, bottom - o - 1) * row, (size_t)depth * sizeof *g);
                g = few;
                row = DEPTH;
            }
            weight_rows(g, row, b, depth, tile + (o - top) * COLUMNS, l == 0);
        }
    }
    for (int64_t o = top; o < bottom; o++)
        put_pairs(p, p->gw + (group * p->o + o) * p->gw_o + i * p->gw_i, tile + (o - top) * COLUMNS, columns);
}

/* Items are (group, panel of input channels, block of output channels). */
static void weight_panels(const void *job, int64_t begin, int64_t end) {
    const products *p = job;
    _Alignas(64) float b[DEPTH * COLUMNS], tile[TILE_ROWS * COLUMNS];
    int64_t panels = parts(p->i, COLUMNS), blocks = parts(p->o, TILE_ROWS);
    for (int64_t item = begin; item < end; item++)
        weight_tile(p, item / blocks / panels, item / blocks % panels * COLUMNS, item % blocks * TILE_ROWS, tile, b);
}

/* Both products at once, the larger items of gw first. */
static void both_panels(const void *job, int64_t begin, int64_t end) {
    const products *p = job;
    if (begin < p->weight_items) weight_panels(job, begin, least(end, p->weight_items));
    if (end > p->weight_items)
        input_panels(job, begin > p->weight_items ? begin - p->weight_items : 0, end - p->weight_items);
}

/* The first tap's values to the others, whole rows at a time. Items are output channels. */
static void copy_taps(const void *job, int64_t begin, int64_t end) {
    const products *p = job;
    for (int64_t o = begin; o < end; o++) {
        float *first = p->gw + o * p->gw_o;
        for (int64_t t = 1; t < p->copies; t++) memcpy(first + t * p->gw_t, first, (size_t)p->i * sizeof *first);
    }
}

/* One input channel a group: a sum of few rows, and dot products. Items are groups. */
static void one_channel(const void *job, int64_t begin, int64_t end) {
    const products *p = job;
    float factors[2][COLUMNS];
    for (int64_t group = begin; group < end; group++) {
        float *gx = p->gx + group * p->length;
        const float *x = p->x + group * p->length;
        for (int64_t o = 0; o < p->o; o++) {
            const float *g = p->g + (group * p->o + o) * p->length;
            v8 dots = v8_all(0), weight = v8_all(p->gx ? p->sums[(group * p->o + o) * ROWS] : 0);
            for (int64_t l = 0; l < p->length; l += 8) {
                int64_t count = least(8, p->length - l);
                v8 value = load_part(g + l, count), to_gx = value, to_gw = value;
                if (p->gx) {
                    if (p->m) factors_of(p->m, p->cells, l, factors[0]), to_gx = v8_mul(value, v8_load(factors[0]));
                    v8 known = o ? load_part(gx + l, count) : v8_all(0);
                    part_store(gx + l, v8_fma(to_gx, weight, known), (int)count);
                }
                if (p->gw) {
                    if (p->n) factors_of(p->n, p->cells, l, factors[1]), to_gw = v8_mul(value, v8_load(factors[1]));
                    dots = v8_fma(to_gw, load_part(x + l, count), dots);
                }
            }
            float lanes[8];
            v8_store(lanes, dots);
            for (int k = 1; k < 8; k++) lanes[0] += lanes[k];
            if (p->gw) put_pairs(p, p->gw + (group * p->o + o) * p->gw_o, lanes, 1);
        }
    }
}

/* None of the sizes is 0: groups, o, i, length, cells, taps; strides of w and of gw (o i t) in elements; copies of each pair in gw.
 * gx NULL: not wanted; gw NULL: not wanted; m or n NULL: 1. */
void et_grid_products_f32(const float *g, const float *m, const float *n, const float *x, const float *w, float *gx,
                          float *gw, float *sums, const int64_t *sizes, int threads) {
    enum { MACS_PER_BYTE = 4 };  /* what is worth a thread is told in bytes */
    products p = {.g = g, .m = m, .n = n, .x = x, .w = w, .gx = gx, .gw = gw, .sums = sums,
                  .groups = sizes[0], .o = sizes[1], .i = sizes[2], .length = sizes[3], .cells = sizes[4],
                  .taps = sizes[5], .w_o = sizes[6], .w_i = sizes[7], .w_t = sizes[8], .gw_o = sizes[9],
                  .gw_i = sizes[10], .gw_t = sizes[11], .copies = sizes[12]};
    int64_t macs = p.groups * p.o * p.i * p.length, rows = p.groups * p.o;
    int64_t room = rows * (p.i + MOST_ROWS - 1), used = rows * parts(p.i, ROWS) * ROWS;
    if (gx) memset(sums + used, 0, (size_t)(room - used) * sizeof *sums);  /* the same bytes at every call */
    if (gx) et_parallel(sum_taps, &p, rows, rows * p.i * p.taps * (int64_t)sizeof *w, threads);
    if (p.i == 1) {
        et_parallel(one_channel, &p, p.groups, 3 * rows * p.length * (int64_t)sizeof *g, threads);
        return;
    }
    int64_t panels = p.groups * parts(p.length, COLUMNS), enough = 8 * threads;
    p.block_rows = ROWS * parts(parts(p.i, ROWS), panels < enough ? parts(enough, panels + 1) : 1);
    p.row_blocks = parts(p.i, p.block_rows);
    p.weight_items = gw ? p.groups * parts(p.i, COLUMNS) * parts(p.o, TILE_ROWS) : 0;
    et_parallel_each(both_panels, &p, p.weight_items + (gx ? panels * p.row_blocks : 0),
                     (gx && gw ? 2 : 1) * macs / MACS_PER_BYTE, threads);
    if (gw && p.gw_i == 1 && p.copies > 1)
        et_parallel(copy_taps, &p, rows, rows * p.i * p.copies * (int64_t)sizeof *gw, threads);
}
