/* Every pixel gets its cell's value: v (n c p q), or in memory (c n p q) with by_channel -> out (n c h w). A row is
 * widened once and written cell_h times. */
#include "cells_types.h"

enum { SPREAD_TILE = 2048, CACHE_BYTES = 16 << 20 };

typedef struct { cells grid; int stream; } spread;

/* A large result goes past the caches: reading it back would cost more than keeping it there saves. */
static inline void put_row(element *to, const element *from, int64_t count, int stream) {
#if defined(__AVX2__) && !defined(ET_PLAIN)
    if (stream && ((uintptr_t)to & 31) == 0 && (count * (int64_t)sizeof *to) % 32 == 0) {
        int64_t step = 32 / (int64_t)sizeof *to;
        for (int64_t i = 0; i < count; i += step)
            _mm256_stream_si256((__m256i *)(void *)(to + i), _mm256_loadu_si256((const __m256i *)(const void *)(from + i)));
        return;
    }
#endif
    (void)stream;
#ifndef ET_BF16
    if (count < 128) {  /* short rows: cheaper than a call */
        int64_t i = 0;
        for (; i + 8 <= count; i += 8) v8_store(to + i, v8_load(from + i));
        if (i < count) part_store(to + i, v8_load(from + i), (int)(count - i));
        return;
    }
#endif
    memcpy(to, from, (size_t)count * sizeof *to);
}

static inline void fence(int stream) {
#if defined(__AVX2__) && !defined(ET_PLAIN)
    if (stream) _mm_sfence();
#endif
    (void)stream;
}

static inline void widen(element *row, const element *v, int64_t cells_here, int64_t wide) {
#ifndef ET_BF16
    if (wide == 2 || wide == 4) {  /* the row has room for a whole vector beyond its end */
        for (int64_t k = 0; k < cells_here; k += 8) {
            v8 low, high, part[4];
            v8_twice(load8(v + k, (int)least(8, cells_here - k)), &low, &high);
            v8_twice(low, &part[0], &part[1]);
            v8_twice(high, &part[2], &part[3]);
            for (int i = 0; i < wide; i++)
                v8_store(row + k * wide + 8 * i, wide == 4 ? part[i] : i ? high : low);
        }
        return;
    }
#endif
    if (wide == 2)
        for (int64_t k = 0; k < cells_here; k++) row[2 * k] = row[2 * k + 1] = v[k];
    else if (wide == 4)
        for (int64_t k = 0; k < cells_here; k++)
            row[4 * k] = row[4 * k + 1] = row[4 * k + 2] = row[4 * k + 3] = v[k];
    else
        for (int64_t k = 0; k < cells_here; k++)
            for (int64_t i = 0; i < wide; i++) row[k * wide + i] = v[k];
}

static void spread_planes(const void *job, int64_t begin, int64_t end) {
    const spread *spread = job;
    const cells *g = &spread->grid;
    _Alignas(64) element row[SPREAD_TILE + 32];
    int64_t step = g->cell_w <= SPREAD_TILE ? SPREAD_TILE / g->cell_w : 1;
    int64_t plane = begin / g->p, p = begin % g->p;
    for (int64_t item = begin; item < end; item++) {
        int64_t top = p * g->cell_h, rows = least(g->cell_h, g->h - top);
        const element *v = (const element *)g->x + cell_row(g, plane / g->c, plane % g->c, p);
        element *out = (element *)g->out + (plane * g->h + top) * g->w;
        if (++p == g->p) p = 0, plane++;
        for (int64_t q = 0; q < g->q; q += step) {
            int64_t cells_here = least(step, g->q - q), left = q * g->cell_w;
            int64_t columns = least(cells_here * g->cell_w, g->w - left);
            if (g->cell_w <= SPREAD_TILE) {
                widen(row, v + q, cells_here, g->cell_w);
                for (int64_t y = 0; y < rows; y++)
                    put_row(out + y * g->w + left, row, columns, spread->stream);
            } else {
                for (int64_t y = 0; y < rows; y++)
                    for (int64_t i = 0; i < columns; i++) out[y * g->w + left + i] = v[q];
            }
        }
    }
    fence(spread->stream);
}

/* Channels last: a tile of cells is turned around, then copied pixel by pixel. */
static void spread_tile(const spread *spread, int64_t image, int64_t p, int64_t q, int64_t channel) {
    const cells *g = &spread->grid;
    _Alignas(64) element tile[TILE_CELLS][TILE_CHANNELS + 8];
    int64_t top = p * g->cell_h, rows = least(g->cell_h, g->h - top);
    int64_t cells_here = least(TILE_CELLS, g->q - q), channels = least(TILE_CHANNELS, g->c - channel);
    for (int64_t j = 0; j < channels; j++) {
        const element *v = (const element *)g->x + cell_row(g, image, channel + j, p) + q;
        for (int64_t k = 0; k < cells_here; k++) tile[k][j] = v[k];
    }
    int64_t left = q * g->cell_w, right = least(left + cells_here * g->cell_w, g->w);
    for (int64_t y = 0; y < rows; y++) {
        element *out = (element *)g->out + (((image * g->h + top + y) * g->w) + left) * g->c + channel;
        for (int64_t x = left; x < right; x++, out += g->c)
            put_row(out, tile[(x - left) / g->cell_w], channels, spread->stream);
    }
}

static void spread_images(const void *job, int64_t begin, int64_t end) {
    const spread *spread = job;
    const cells *g = &spread->grid;
    for (int64_t item = begin; item < end; item++)
        for (int64_t q = 0; q < g->q; q += TILE_CELLS)
            for (int64_t channel = 0; channel < g->c; channel += TILE_CHANNELS)
                spread_tile(spread, item / g->p, item % g->p, q, channel);
    fence(spread->stream);
}

void NAME(et_patch_spread)(const element *v, element *out, int64_t n, int64_t c, int64_t h, int64_t w,
                           int64_t cell_h, int64_t cell_w, int channels_last, int by_channel, int threads) {
    spread job = {.grid = grid(n, c, h, w, cell_h, cell_w)};
    job.grid.x = v;
    job.grid.out = out;
    if (by_channel) lay_by_channel(&job.grid);
    int64_t bytes = elements(&job.grid) * (int64_t)sizeof *v;
    if (bytes == 0) return;
    job.stream = bytes > CACHE_BYTES;
    if (channels_last) et_parallel(spread_images, &job, n * job.grid.p, bytes, threads);
    else et_parallel(spread_planes, &job, n * c * job.grid.p, bytes, threads);
}
