/* Sums over the cells of a patch grid: the walk that patch_mean, masked_patch_mean and the counts share.
 *
 * A kernel file defines, before including this file,
 *   WALK           the name of its walk
 *   LOAD(at, k)    a v8: the terms of the k (0..8) elements from offset `at` in memory order, 0 beyond k
 *   PUT(at, s, r)  store the sum s of a whole cell at output offset `at`; r = 1 / pixels of the cell
 *   PUT8(at, s, r, k)  the same for k (1..8) neighbouring cells of one size
 * and may use `walk` (its argument) in all three. Output is (n c P Q); offsets are 64 bits wide. */
#include "cells_types.h"

/* The terms of `count` columns, added over the rows of a cell. */
AHEAD v8 FN(column8_)(const cells *walk, int64_t at, int64_t rows, int count) {
    v8 sum = LOAD(at, count);
    for (int64_t row = 1; row < rows; row++) sum = v8_add(sum, LOAD(at + row * walk->w, count));
    return sum;
}

/* Up to eight neighbouring cells, 2 or 4 columns wide, over `columns` columns. */
AHEAD v8 FN(narrow_)(const cells *walk, int64_t at, int64_t rows, int wide, int64_t columns) {
    v8 part[4];
    for (int i = 0; i < wide; i++) {
        int64_t here = columns - 8 * i;
        part[i] = here <= 0 ? v8_all(0) : FN(column8_)(walk, at + 8 * i, rows, (int)least(8, here));
    }
    if (wide == 2) return v8_pairs(part[0], part[1]);
    return v8_pairs(v8_pairs(part[0], part[1]), v8_pairs(part[2], part[3]));
}

/* Rows of a cell lie apart, which hides from the processor that the whole is read in order: it is told here. */
AHEAD void FN(fetch_)(const cells *walk, int64_t at, int64_t count) {
    if (!walk->x) return;
    for (int64_t i = 0; i < count; i += LINE)
        __builtin_prefetch((const element *)walk->x + at + i + FETCH_LINES * LINE);
}

/* A row of cells 2 or 4 columns wide; the last cell may be short. */
AHEAD void FN(narrow_row_)(const cells *walk, int64_t at, int64_t to, int64_t rows, int wide) {
    float scale = 1.0f / (float)(rows * wide), lanes[8];
    int64_t q = 0, rest = walk->w % wide;
    for (; (q + 8) * wide <= walk->w; q += 8) {
        FN(fetch_)(walk, at + q * wide * rows, 8 * wide * rows);
        PUT8(to + q, FN(narrow_)(walk, at + q * wide, rows, wide, 8 * wide), scale, 8);
    }
    if (q == walk->q) return;
    int count = (int)(walk->q - q);
    v8 sums = FN(narrow_)(walk, at + q * wide, rows, wide, walk->w - q * wide);
    PUT8(to + q, sums, scale, count);
    if (rest) {
        v8_store(lanes, sums);
        PUT(walk->q - 1 + to, lanes[count - 1], 1.0f / (float)(rows * rest));
    }
}

/* One cell of any width. */
static float FN(cell_)(const cells *walk, int64_t at, int64_t rows, int64_t columns) {
    v8 sum = v8_all(0);
    for (int64_t column = 0; column < columns; column += 8)
        sum = v8_add(sum, FN(column8_)(walk, at + column, rows, (int)least(8, columns - column)));
    sum = v8_pairs(sum, v8_all(0));
    sum = v8_pairs(sum, v8_all(0));
    sum = v8_pairs(sum, v8_all(0));
    float lanes[8];
    v8_store(lanes, sum);
    return lanes[0];
}

/* Cells of any width: whole rows are added first, a tile of columns at a time, then each cell's columns. */
static void FN(wide_row_)(const cells *walk, int64_t at, int64_t to, int64_t rows, int64_t full) {
    int64_t wide = walk->cell_w, step = TILE / wide;
    float scale = 1.0f / (float)(rows * wide), tile[TILE];
    for (int64_t q = 0; q < full; q += step) {
        int64_t cells_here = least(step, full - q), columns = cells_here * wide, j = 0;
        FN(fetch_)(walk, at + q * wide * rows, columns * rows);
        for (; j + 8 <= columns; j += 8) v8_store(tile + j, FN(column8_)(walk, at + q * wide + j, rows, 8));
        if (j < columns) {
            int count = (int)(columns - j);
            part_store(tile + j, FN(column8_)(walk, at + q * wide + j, rows, count), count);
        }
        for (int64_t k = 0; k < cells_here; k++) {
            float sum = 0;
            for (int64_t i = 0; i < wide; i++) sum += tile[k * wide + i];
            PUT(to + q + k, sum, scale);
        }
    }
}

static void FN(planes_)(const void *job, int64_t begin, int64_t end) {
    const cells *walk = job;
    int64_t wide = walk->cell_w, full = walk->w / wide, rest = walk->w % wide;
    int64_t plane = begin / walk->p, p = begin % walk->p;
    for (int64_t item = begin; item < end; item++) {
        int64_t top = p * walk->cell_h, rows = least(walk->cell_h, walk->h - top);
        int64_t at = (plane * walk->h + top) * walk->w;
        int64_t to = cell_row(walk, plane / walk->c, plane % walk->c, p);
        if (++p == walk->p) p = 0, plane++;
        if (wide == 2 || wide == 4) {
            if (wide == 2 && rows == 2) FN(narrow_row_)(walk, at, to, 2, 2);
            else if (wide == 2) FN(narrow_row_)(walk, at, to, rows, 2);
            else if (rows == 4) FN(narrow_row_)(walk, at, to, 4, 4);
            else FN(narrow_row_)(walk, at, to, rows, 4);
            continue;
        }
        if (wide <= 32) FN(wide_row_)(walk, at, to, rows, full);
        else for (int64_t q = 0; q < full; q++)
            PUT(to + q, FN(cell_)(walk, at + q * wide, rows, wide), 1.0f / (float)(rows * wide));
        if (rest) PUT(to + full, FN(cell_)(walk, at + full * wide, rows, rest), 1.0f / (float)(rows * rest));
    }
}

/* Channels last: the terms of `count` channels, added over the pixels that a cell has in one row. */
AHEAD v8 FN(pixels8_)(const cells *walk, int64_t at, int64_t columns, int count) {
    v8 sum = LOAD(at, count);
    for (int64_t column = 1; column < columns; column++) sum = v8_add(sum, LOAD(at + column * walk->c, count));
    return sum;
}

/* Adds one row of a cell to the sums of its channels. */
AHEAD void FN(cell_row_)(const cells *walk, int64_t at, int64_t columns, int64_t channels, float *sums, int first) {
    FN(fetch_)(walk, at, columns * walk->c);
    for (int64_t j = 0; j < channels; j += 8) {
        int count = (int)least(8, channels - j);
        v8 sum = count == 8 ? FN(pixels8_)(walk, at + j, columns, 8) : FN(pixels8_)(walk, at + j, columns, count);
        v8_store(sums + j, first ? sum : v8_add(v8_load(sums + j), sum));
    }
}

/* A tile of neighbouring cells and channels: read row by row, as it lies in memory, then written cell by cell. */
static void FN(tile_)(const cells *walk, int64_t image, int64_t p, int64_t q, int64_t channel) {
    float tile[TILE_CELLS][TILE_CHANNELS + 8], scale[TILE_CELLS];
    int64_t top = p * walk->cell_h, rows = least(walk->cell_h, walk->h - top);
    int64_t cells_here = least(TILE_CELLS, walk->q - q), channels = least(TILE_CHANNELS, walk->c - channel);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < cells_here; k++) {
            int64_t left = (q + k) * walk->cell_w, columns = least(walk->cell_w, walk->w - left);
            int64_t at = ((image * walk->h + top + row) * walk->w + left) * walk->c + channel;
            scale[k] = 1.0f / (float)(rows * columns);
            if (columns == 2) FN(cell_row_)(walk, at, 2, channels, tile[k], row == 0);
            else if (columns == 4) FN(cell_row_)(walk, at, 4, channels, tile[k], row == 0);
            else FN(cell_row_)(walk, at, columns, channels, tile[k], row == 0);
        }
    for (int64_t j = 0; j < channels; j++) {
        int64_t to = cell_row(walk, image, channel + j, p) + q;
        for (int64_t k = 0; k < cells_here; k++) PUT(to + k, tile[k][j], scale[k]);
    }
}

static void FN(images_)(const void *job, int64_t begin, int64_t end) {
    const cells *walk = job;
    for (int64_t item = begin; item < end; item++)
        for (int64_t channel = 0; channel < walk->c; channel += TILE_CHANNELS)
            for (int64_t q = 0; q < walk->q; q += TILE_CELLS)
                FN(tile_)(walk, item / walk->p, item % walk->p, q, channel);
}

static void FN(run_)(const cells *walk, int channels_last, int64_t bytes, int threads) {
    int64_t items = walk->n * walk->p * (channels_last ? 1 : walk->c);
    if (elements(walk) == 0) return;
    et_parallel(channels_last ? FN(images_) : FN(planes_), walk, items, bytes, threads);
}

#undef WALK
#undef LOAD
#undef PUT
#undef PUT8
