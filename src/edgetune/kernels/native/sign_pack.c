/* One bit a value that is at least 0, by pixel: x (n c h w), in either memory order, -> words (n h w word), filled up
 * with 0 bits; and back, as +1 and -1 (n h w c). And plain bits of filters, (o u v word), to the blocks of binary.h, or
 * to the words of depthwise.h. */
#include "depthwise.h"

typedef struct {
    const float *x;
    float *y;
    uint64_t *bits;
    int64_t c, pixels, words;  /* pixels of one sample */
    int last;
} signs;

enum { SOME = 64 };  /* pixels of an item where channels lie apart */

/* The signs of up to 64 channels side by side. */
static inline uint64_t word_of(const float *x, int64_t count) {
    uint64_t word = 0;
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) word |= (uint64_t)v8_at_least(v8_load(x + k), v8_all(0)) << k;
    for (; k < count; k++) word |= (uint64_t)(x[k] >= 0) << k;
    return word;
}

/* Items are pixels of all samples. */
static void pack_pixels(const void *job, int64_t begin, int64_t end) {
    const signs *s = job;
    for (int64_t pixel = begin; pixel < end; pixel++)
        for (int64_t k = 0; k < s->words; k++)
            s->bits[pixel * s->words + k] = word_of(s->x + pixel * s->c + 64 * k, least(64, s->c - 64 * k));
}

/* Up to 32 channels that lie `apart`, of `count` pixels. */
static inline void half_words(const float *x, int64_t channels, int64_t apart, int64_t count, uint32_t half[SOME]) {
    for (int64_t i = 0; i < SOME; i++) half[i] = 0;
    for (int64_t k = 0; k < channels; k++) {
        const float *row = x + k * apart;
        uint32_t bit = (uint32_t)1 << k;
        if (count == SOME)
            for (int i = 0; i < SOME; i++) half[i] |= row[i] >= 0 ? bit : 0;
        else
            for (int64_t i = 0; i < count; i++) half[i] |= row[i] >= 0 ? bit : 0;
    }
}

/* Items are (sample, some pixels). */
static void pack_planes(const void *job, int64_t begin, int64_t end) {
    const signs *s = job;
    int64_t blocks = (s->pixels + SOME - 1) / SOME;
    for (int64_t item = begin; item < end; item++) {
        int64_t sample = item / blocks, first = item % blocks * SOME, count = least(SOME, s->pixels - first);
        for (int64_t k = 0; k < s->words; k++) {
            int64_t channels = least(64, s->c - 64 * k);
            const float *x = s->x + (sample * s->c + 64 * k) * s->pixels + first;
            uint32_t low[SOME], high[SOME];
            half_words(x, least(32, channels), s->pixels, count, low);
            half_words(x + 32 * s->pixels, channels - 32, s->pixels, count, high);
            uint64_t *to = s->bits + (sample * s->pixels + first) * s->words + k;
            for (int64_t i = 0; i < count; i++) to[i * s->words] = (uint64_t)high[i] << 32 | low[i];
        }
    }
}

void et_sign_pack_f32(const float *x, uint64_t *bits, int64_t n, int64_t c, int64_t pixels, int last,
                      int threads) {
    signs job = {.x = x, .bits = bits, .c = c, .pixels = pixels, .words = parts(c, 64)};
    int64_t bytes = n * c * pixels * (int64_t)sizeof *x;
    if (last) et_parallel(pack_pixels, &job, n * pixels, bytes, threads);
    else et_parallel(pack_planes, &job, n * ((pixels + SOME - 1) / SOME), bytes, threads);
}

/* Items are pixels of all samples. */
static void unpack_pixels(const void *job, int64_t begin, int64_t end) {
    const signs *s = job;
    for (int64_t pixel = begin; pixel < end; pixel++)
        for (int64_t k = 0; k < s->c; k += 8) {
            unsigned mask = s->bits[pixel * s->words + k / 64] >> (k % 64) & 0xff;
            part_store(s->y + pixel * s->c + k, v8_add(v8_keep(v8_all(2), mask), v8_all(-1)), (int)least(8, s->c - k));
        }
}

void et_sign_unpack_f32(const uint64_t *bits, float *y, int64_t pixels, int64_t c, int threads) {
    signs job = {.bits = (uint64_t *)bits, .y = y, .c = c, .words = parts(c, 64)};
    et_parallel(unpack_pixels, &job, pixels, pixels * c * (int64_t)sizeof *y, threads);
}

/* The first bit of every tap, (o taps words) -> (tap word). */
static void turn_taps(const uint64_t *bits, uint64_t *to, int64_t o, int64_t taps, int64_t words) {
    memset(to, 0, (size_t)(taps * parts(o, 64)) * sizeof *to);
    for (int64_t row = 0; row < o; row++)
        for (int64_t t = 0; t < taps; t++)
            to[t * parts(o, 64) + row / 64] |= (bits[(row * taps + t) * words] & 1) << row % 64;
}

/* bits (o taps words) of `groups` groups, each filter with `bytes` bytes a tap; 0 of them for a depthwise layer. */
void et_arrange_filters_f32(const uint8_t *bits, uint8_t *filters, int64_t o, int64_t groups, int64_t taps,
                            int64_t words, int64_t bytes, int threads) {
    (void)threads;
    if (bytes == 0) {
        turn_taps((const uint64_t *)(const void *)bits, (uint64_t *)(void *)filters, o, taps, words);
        return;
    }
    int64_t each = o / groups, blocks = (each + LANES - 1) / LANES, block = taps * bytes * LANES;
    memset(filters, 0, (size_t)(groups * blocks * block));
    for (int64_t row = 0; row < o; row++) {
        int64_t in_group = row % each;
        uint8_t *to = filters + (row / each * blocks + in_group / LANES) * block + lane_of((int)(in_group % LANES));
        for (int64_t t = 0; t < taps; t++)
            for (int64_t k = 0; k < bytes; k++) to[(t * bytes + k) * LANES] = bits[(row * taps + t) * words * 8 + k];
    }
}
