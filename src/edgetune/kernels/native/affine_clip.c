/* What follows a convolution value by value, channels last: gain and shift of a norm, a residual, the bounds of an
 * activation; and bits of what is at least 0 of that, as sign_pack has them. A NaN stays one. */
#include "binary.h"

typedef struct {
    const float *x, *gain, *shift, *residual;
    float low, high;
    float *y;
    uint64_t *bits;
    int64_t c;
} clipping;

/* Up to 64 channels of a pixel, from `at` on in memory. */
static inline __attribute__((always_inline)) uint64_t clip_word(const clipping *j, int64_t at, int64_t channel,
                                                                int64_t count, int affine, int residual) {
    v8 low = v8_all(j->low), high = v8_all(j->high);
    uint64_t word = 0;
    for (int64_t k = 0; k < count; k += 8) {
        int64_t some = least(8, count - k);
        v8 v = load_few(j->x + at + k, some);
        if (affine) v = v8_fma(v, load_few(j->gain + channel + k, some), load_few(j->shift + channel + k, some));
        if (residual) v = v8_add(v, load_few(j->residual + at + k, some));
        v = v8_least(high, v8_most(low, v));  /* in this order, a NaN goes through */
        if (j->y) part_store(j->y + at + k, v, (int)some);
        word |= (uint64_t)(v8_at_least(v, v8_all(0)) & ((1u << some) - 1)) << k;
    }
    return word;
}

/* Items are pixels of all samples. */
static void clip_pixels(const void *job, int64_t begin, int64_t end) {
    const clipping *j = job;
    int64_t words = parts(j->c, 64);
    for (int64_t pixel = begin; pixel < end; pixel++)
        for (int64_t k = 0; k < words; k++) {
            int64_t channel = 64 * k, at = pixel * j->c + channel, count = least(64, j->c - channel);
            uint64_t word = j->gain == NULL && j->residual == NULL ? clip_word(j, at, channel, count, 0, 0)
                : j->gain == NULL ? clip_word(j, at, channel, count, 0, 1)
                : j->residual == NULL ? clip_word(j, at, channel, count, 1, 0)
                : clip_word(j, at, channel, count, 1, 1);
            if (j->bits) j->bits[pixel * words + k] = word;
        }
}

/* gain and shift are both given or neither; y, bits or both are wanted. */
void et_affine_clip_f32(const float *x, const float *gain, const float *shift, const float *residual, float low,
                        float high, float *y, uint64_t *bits, int64_t pixels, int64_t c, int threads) {
    clipping job = {.x = x, .gain = gain, .shift = shift, .residual = residual, .low = low, .high = high, .y = y,
                    .bits = bits, .c = c};
    et_parallel(clip_pixels, &job, pixels, 3 * pixels * c * (int64_t)sizeof *x, threads);
}
