/* Prints a checksum of every kernel's answer on made-up data, one a line: two builds of it must print the same. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t I;
#define DECLARE(type, t) \
    void et_patch_mean_##t(const type *, type *, I, I, I, I, I, I, int, int, int); \
    void et_masked_patch_mean_##t(const type *, const uint8_t *, type *, I, I, I, I, I, I, int, int); \
    void et_mask_count_##t(const type *, void *, float, float, I, I, I, I, I, I, int, int); \
    void et_bits_count_##t(const uint8_t *, void *, I, I, I, I, I, I, int, int); \
    void et_patch_spread_##t(const type *, type *, I, I, I, I, I, I, int, int, int); \
    void et_mask_pack_##t(const type *, uint8_t *, float, float, I, int); \
    void et_mask_apply_##t(const type *, const uint8_t *, type *, I, int); \
    void et_norm_backward_##t(const type *, const uint8_t *, const type *, const float *, const float *, const float *, \
                              type *, float *, float *, float *, I, I, I, I, I, float, int); \
    void et_group_pack_##t(const type *, uint8_t *, I, int, I, I, int, int); \
    void et_max_pool_##t(const type *, type *, uint8_t *, const I *, int, int);
DECLARE(float, f32)
DECLARE(uint16_t, bf16)
void et_max_pool_backward_f32(const float *, uint8_t *, float *, const I *, int, int);
void et_group_unpack_f32(const uint8_t *, float *, I, int, I, int);
void et_bounded_sizes_f32(const float *, int32_t *, I, float, float, int);
void et_bounded_encode_f32(const float *, uint8_t *, const I *, I *, I, float, float, int);
void et_bounded_decode_f32(const uint8_t *, I, float *, I *, I *, I, float, int);
void et_grid_products_f32(const float *, const float *, const float *, const float *, const float *, float *, float *,
                          float *, const I *, int);
void et_sign_pack_f32(const float *, uint64_t *, I, I, I, int, int);
void et_sign_unpack_f32(const uint64_t *, float *, I, I, int);
void et_arrange_filters_f32(const uint8_t *, uint8_t *, I, I, I, I, I, int);
void et_binary_conv_f32(const uint8_t *, const uint8_t *, const float *, const float *, const float *, const float *,
                        const int32_t *, const uint8_t *, float *, uint64_t *, void *, const I *, float, float, int);
void et_bit_weight_conv_f32(const uint8_t *, const uint8_t *, const float *, const float *, const float *, float *,
                            int32_t *, uint8_t *, const I *, int);
void et_affine_clip_f32(const float *, const float *, const float *, const float *, float, float, float *, uint64_t *,
                        I, I, int);

enum { ROOM = 1 << 18 };
static uint32_t state = 1;
static uint32_t next(void) { return state = state * 1664525u + 1013904223u; }

/* Sixteenths from -4 to 4, many of them equal, and now and then a NaN or an infinity. */
static float value(void) {
    uint32_t r = next() >> 8;
    if (r % 97 == 0) return r % 2 ? __builtin_inff() : __builtin_nanf("");
    return (float)((int)(r % 129) - 64) / 16.0f;
}
static void show(const char *name, const void *data, size_t bytes) {
    uint64_t sum = 1469598103934665603u;
    for (size_t i = 0; i < bytes; i++) sum = (sum ^ ((const uint8_t *)data)[i]) * 1099511628211u;
    printf("%s %016llx\n", name, (unsigned long long)sum);
}

static void *room(void) { return calloc(ROOM, 8); }
/* A NaN's sign and payload are nobody's promise. */
static void plain_nans(float *x, I count) { for (I i = 0; i < count; i++) if (x[i] != x[i]) x[i] = 7777; }
static void plain_nans_bf16(uint16_t *x, I count) { for (I i = 0; i < count; i++) if ((x[i] & 0x7fff) > 0x7f80) x[i] = 7; }
#define SETTLE_f32(x, k) plain_nans(x, k)
#define SETTLE_bf16(x, k) plain_nans_bf16(x, k)

/* Scales and means of channels in quarters, and variances of 1: sums of sixteenths are whole. */
static const float *of_channels(int kind) {
    static float values[3][128];
    for (int i = 0; i < 128; i++) {
        values[0][i] = (float)(i % 9 - 4) / 4;
        values[1][i] = (float)(i % 5 - 2) / 4;
        values[2][i] = 1;
    }
    return values[kind];
}

#define CHECK(type, t) \
static void check_##t(const type *x, const uint8_t *bits, I n, I c, I h, I w, I a, I b, int last) { \
    I p = (h + a - 1) / a, q = (w + b - 1) / b, all = n * c * h * w, cells = n * c * p * q; \
    type *out = room(); \
    uint8_t *bytes = room(); \
    size_t wide = a * b <= 255 ? 1 : 4; \
    et_patch_mean_##t(x, out, n, c, h, w, a, b, last, last, 2); SETTLE_##t(out, cells); show("patch_mean", out, cells * sizeof *out); \
    et_patch_spread_##t(x, out, n, c, h, w, a, b, last, !last, 2); SETTLE_##t(out, all); show("patch_spread", out, all * sizeof *out); \
    et_masked_patch_mean_##t(x, bits, out, n, c, h, w, a, b, last, 2); SETTLE_##t(out, cells); show("masked", out, cells * sizeof *out); \
    et_mask_count_##t(x, bytes, -1, 2, n, c, h, w, a, b, last, 2); show("mask_count", bytes, cells * wide); \
    et_bits_count_##t(bits, bytes, n, c, h, w, a, b, last, 2); show("bits_count", bytes, cells * wide); \
    et_mask_pack_##t(x, bytes, -1, 2, all, 2); show("mask_pack", bytes, (all + 7) / 8); \
    et_mask_apply_##t(x, bits, out, all, 2); SETTLE_##t(out, all); show("mask_apply", out, all * sizeof *out); \
    I pixels = h * w, each = last ? 32 : 0; \
    float *gw = room(), *gb = room(), *scratch = room(); \
    et_norm_backward_##t(x, bits, x + 3, of_channels(0), of_channels(1), of_channels(2), out, gw, gb, scratch, \
                         n, c, pixels, each, (n * pixels + 31) / 32, 0, 2); \
    SETTLE_##t(out, all); plain_nans(gw, c); plain_nans(gb, c); \
    show("norm", out, all * sizeof *out); show("norm gw", gw, c * sizeof *gw); show("norm gb", gb, c * sizeof *gb); \
    free(gw); free(gb); free(scratch); \
    I s = b < 3 ? b : 2, g[] = {n, c, h, w, (h + 2 - 3) / s + 1, (w + 2 - 3) / s + 1, 3, 3, s, s, 1, 1, 1, 1}; \
    I outs = n * c * g[4] * g[5]; \
    et_max_pool_##t(x, out, bytes, g, last, 2); SETTLE_##t(out, outs); \
    show("max_pool", out, outs * sizeof *out); show("index", bytes, outs); \
    free(out); free(bytes); \
}
CHECK(float, f32)
CHECK(uint16_t, bf16)

/* Whole groups, a short last one, and one that can't be written. */
static void check_groups(const float *x, const uint16_t *half) {
    static const I counts[] = {0, 1, 7, 8, 31, 33, 256, 300, 5000};
    uint8_t *packed = room();
    float *out = room();
    for (int k = 0; k < 9; k++)
        for (int bits = 2; bits <= 8; bits *= 2)
            for (int stochastic = 0; stochastic < 2; stochastic++) {
                I count = counts[k], group = k % 2 ? 256 : 96, tile = 64 / bits;
                size_t bytes = 6 * ((count + group - 1) / group) + 8 * ((count + tile - 1) / tile);
                et_group_pack_bf16(half, packed, count, bits, group, 77, stochastic, 2);
                show("group_pack bf16", packed, bytes);
                et_group_pack_f32(x, packed, count, bits, group, -5, stochastic, 2);
                show("group_pack", packed, bytes);
                et_group_unpack_f32(packed, out, count, bits, group, 2);
                plain_nans(out, count);
                show("group_unpack", out, count * sizeof *out);
            }
    free(packed); free(out);
}

/* groups, o, i, samples, cells, taps, whether the weight lies channels last. Whole sixteenths add up exactly. */
static void check_products(float *x) {
    static const I cases[][7] = {{1, 24, 16, 2, 15, 9, 0}, {1, 40, 37, 1, 49, 9, 1}, {3, 5, 7, 2, 16, 25, 0}, {6, 2, 1, 3, 9, 9, 0},
                                 {1, 490, 3, 1, 20, 1, 0}, {1, 3, 270, 1, 272, 4, 1}, {2, 8, 8, 1, 1, 9, 0}};
    float *gx = room(), *gw = room(), *sums = room();
    for (I i = 0; i < ROOM; i++) x[i] = (float)((int)(next() >> 8) % 33) / 16.0f;
    for (int k = 0; k < 7; k++) {
        const I *s = cases[k];
        I length = s[3] * s[4], o_w = s[2] * s[5], i_w = s[6] ? 1 : s[5], t_w = s[6] ? s[2] : 1;
        const I sizes[] = {s[0], s[1], s[2], length, s[4], s[5], o_w, i_w, t_w, o_w, i_w, t_w, s[5]};
        et_grid_products_f32(x, x + 7, x + 11, x + 1001, x + 2003, gx, gw, sums, sizes, 2);
        show("products gx", gx, s[0] * s[2] * length * sizeof *gx);
        show("products gw", gw, s[0] * s[1] * o_w * sizeof *gw);
        et_grid_products_f32(x, NULL, NULL, x + 1001, x + 2003, NULL, gw, sums, sizes, 1);
        show("products gw alone", gw, s[0] * s[1] * o_w * sizeof *gw);
    }
    free(gx); free(gw); free(sums);
}

/* Values with and without a NaN, zeros, an offset and steps from one to the next; the bytes and what comes back. */
static void check_bounded(float *x) {
    static const float halves[] = {0, 1e-5f, 0.01f, 0.3f};
    uint8_t *packed = room();
    float *back = room();
    I starts[5], unfit, broken;
    for (int kind = 0; kind < 6; kind++)
        for (int bound = 0; bound < 4; bound++) {
            I count = 20000 + 77 * kind, chunks = (count + 8191) / 8192;
            float e = halves[bound], scale = e > 0 ? 0.5f / e : 0, walk = 0;
            int32_t sizes[4];
            for (I i = 0; i < count; i++) {
                float v = (float)((int)(next() >> 8) % 2001 - 1000) / 512;
                walk += v / 8;
                x[i] = kind == 0 ? value() : kind == 1 ? v : kind == 2 ? v + 9 : kind == 3 ? walk : walk > 0 ? v : 0;
                if (kind == 5 && v < 1) x[i] = 0;
            }
            et_bounded_sizes_f32(x, sizes, count, e, scale, 2);
            starts[0] = 32 + 8 * chunks;
            for (I i = 0; i < chunks; i++) starts[i + 1] = starts[i] + sizes[i];
            memset(packed, 0, 32);
            et_bounded_encode_f32(x, packed, starts, &unfit, count, e, scale, 2);
            show("bounded_encode", packed, starts[chunks]);
            et_bounded_decode_f32(packed, starts[chunks], back, starts, &broken, count, e, 2);
            printf("unfit %d broken %d\n", (int)unfit, (int)broken);
            show("bounded_decode", back, count * sizeof *back);
        }
    free(packed); free(back);
}

/* n h w, channels and filters of a group, groups, kernel, stride, pad, dilation, value of the border; batches cut in two. */
static void check_binary(float *x, const uint8_t *bytes) {
    static const I cases[][11] = {{1, 6, 7, 64, 64, 1, 3, 1, 1, 1, 0}, {2, 9, 8, 70, 33, 2, 3, 2, 1, 1, 1},
                                  {3, 5, 5, 3, 100, 1, 5, 1, 2, 2, 0}, {2, 4, 9, 130, 70, 1, 1, 1, 0, 1, -1},
                                  {1, 8, 8, 1, 1, 40, 3, 1, 1, 1, 0}, {2, 5, 9, 1, 1, 130, 5, 2, 2, 1, 1}, {1, 2, 2, 7300, 2, 1, 3, 1, 1, 1, 0},
                                  {2, 6, 6, 5, 3, 6, 3, 1, 1, 1, 0}, {1, 7, 7, 1, 1, 300, 3, 1, 1, 1, 0}};
    float *y = room();
    uint8_t *scratch = room(), *flips = room();
    uint64_t *bits = room(), *plain = room(), *filters = room(), *out = room();
    int32_t *limits = room();
    for (I i = 0; i < ROOM; i++) x[i] = value(), limits[i] = (int32_t)(next() >> 8) % 21 - 10, flips[i] = next() >> 8 & 1;
    for (int k = 0; k < 9; k++) {
        const I *s = cases[k], n = s[0], h = s[1], w = s[2], i = s[3], o = s[4], g = s[5], t = s[6], d = s[9];
        I p = (h + 2 * s[8] - d * (t - 1) - 1) / s[7] + 1, q = (w + 2 * s[8] - d * (t - 1) - 1) / s[7] + 1;
        I words = (i + 63) / 64, wide = i * o == 1 ? 0 : (i + 7) / 8;
        I outs = n * p * q * o * g, out_words = n * p * q * ((o * g + 63) / 64);
        et_sign_pack_f32(x, bits, n, i * g, h * w, k % 2, 2);
        show("sign_pack", bits, n * h * w * ((i * g + 63) / 64) * 8);
        et_sign_unpack_f32(bits, y, n * h * w, i * g, 2);
        show("sign_unpack", y, n * h * w * i * g * sizeof *y);
        et_sign_pack_f32(x + 777, plain, o * g, i, t * t, 0, 2);
        et_arrange_filters_f32((uint8_t *)plain, (uint8_t *)filters, o * g, g, t * t, words, wide, 2);
        show("arrange_filters", filters, wide ? g * ((o + 31) / 32) * t * t * wide * 32 : t * t * ((g + 63) / 64) * 8);
        I sizes[] = {n, h, w, p, q, i * g, o * g, t, t, s[7], s[7], s[8], s[8], s[8], s[8], d, d, g, s[10], 2};
        for (I c = 0; c < outs; c++) y[c] = 0;
        et_binary_conv_f32((uint8_t *)bits, (uint8_t *)filters, NULL, NULL, NULL, NULL, NULL, NULL, y, NULL, scratch,
                           sizes, -INFINITY, INFINITY, 2);
        show("binary_conv", y, outs * sizeof *y);
        et_binary_conv_f32((uint8_t *)bits, (uint8_t *)filters, NULL, NULL, NULL, NULL, limits, flips, NULL, out,
                           scratch, sizes, -INFINITY, INFINITY, 2);
        show("binary_conv_sign", out, out_words * 8);
        for (I c = 0; c < ROOM; c++) x[c] = (float)((int)(next() >> 8) % 33 - 16) / 16.0f;
        et_binary_conv_f32((uint8_t *)bits, (uint8_t *)filters, x, x + 3000, x + 5000, x + 9000, NULL, NULL, y, out,
                           scratch, sizes, -20, 20, 1);
        show("binary_conv_clip y", y, outs * sizeof *y);
        show("binary_conv_clip", out, out_words * 8);
        sizes[18] = 128;
        et_bit_weight_conv_f32(bytes, (uint8_t *)filters, NULL, NULL, NULL, NULL, limits, scratch, sizes, 2);
        show("bit_weight_conv", limits, outs * sizeof *limits);
        et_bit_weight_conv_f32(bytes, (uint8_t *)filters, x, x + 5000, x + 9000, y, NULL, scratch, sizes, 2);
        show("bit_weight_conv y", y, outs * sizeof *y);
        for (I c = 0; c < ROOM; c++) x[c] = value(), limits[c] = (int32_t)(next() >> 8) % 21 - 10;
    }
    free(y); free(scratch); free(flips); free(bits); free(plain); free(filters); free(out); free(limits);
}

/* pixels, channels; with and without a norm and a residual. */
static void check_clip(float *x) {
    static const I cases[][2] = {{50, 64}, {7, 70}, {9, 3}, {20, 130}, {5, 200}};
    float *y = room();
    uint64_t *bits = room();
    for (I i = 0; i < ROOM; i++) x[i] = value();
    for (int k = 0; k < 20; k++) {
        I pixels = cases[k % 5][0], c = cases[k % 5][1], words = (c + 63) / 64;
        et_affine_clip_f32(x, k & 1 ? x + 7000 : NULL, k & 1 ? x + 8000 : NULL, k & 2 ? x + 9000 : NULL, -1, 1, y, bits,
                           pixels, c, 2);
        plain_nans(y, pixels * c);
        show("affine_clip", y, pixels * c * sizeof *y);
        show("affine_clip bits", bits, pixels * words * 8);
    }
    free(y); free(bits);
}

#include "neon_adder.h"

int main(void) {
    static const I shapes[][4] = {{2, 3, 7, 9}, {1, 16, 14, 14}, {2, 5, 9, 33}, {1, 70, 6, 21}, {1, 3, 40, 56}};
    static const I patches[][2] = {{1, 1}, {2, 2}, {4, 4}, {3, 3}, {2, 5}, {7, 9}, {20, 40}};
    float *x = room();
    uint16_t *half = room();
    uint8_t *bits = room();
    for (I i = 0; i < ROOM; i++) {
        x[i] = value();
        memcpy(&half[i], (const char *)&x[i] + 2, 2);
        bits[i] = (uint8_t)(next() >> 16);
    }
    for (int s = 0; s < 5; s++)
        for (int r = 0; r < 7; r++)
            for (int last = 0; last < 2; last++) {
                const I *shape = shapes[s];
                check_f32(x, bits, shape[0], shape[1], shape[2], shape[3], patches[r][0], patches[r][1], last);
                check_bf16(half, bits, shape[0], shape[1], shape[2], shape[3], patches[r][0], patches[r][1], last);
            }
    check_products(x);
    check_adders(x, bits);
    for (I i = 0; i < ROOM; i++) {
        float fine = (float)(int)next() * (i % 1000 < 500 ? 1e-9f : 1e-42f);
        x[i] = i == 2000 ? __builtin_inff() : fine;
        memcpy(&half[i], (const char *)&x[i] + 2, 2);
    }
    check_groups(x, half);
    check_bounded(x);
    check_binary(x, bits);
    check_clip(x);
    float *y = room(), *gx = room();
    uint8_t *index = room();
    const I g[] = {2, 9, 15, 20, 8, 10, 3, 3, 2, 2, 1, 1, 1, 1};
    for (int last = 0; last < 2; last++) {
        et_max_pool_f32(x, y, index, g, last, 2);
        for (I i = 0; i < 1440; i++) y[i] = (float)(i % 31);
        et_max_pool_backward_f32(y, index, gx, g, last, 2);
        show("max_pool_backward", gx, 5400 * sizeof *gx);
    }
    return 0;
}
