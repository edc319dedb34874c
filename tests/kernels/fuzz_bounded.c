/* Searches for bytes that the decoder of the error-bounded codec does not survive: with clang's libFuzzer
 * (-DET_LIBFUZZER), or by itself, guided by the coverage of the codec's own file (-fsanitize-coverage=trace-pc).
 *
 * An input's first byte says what the others are: a whole packed tensor, the bytes of one or two chunks, or values to
 * be packed and unpacked. All buffers have exactly the size that they need, so that a sanitizer sees any step beyond.
 * Usage: fuzz_bounded SECONDS SEED; prints how many inputs were tried and kept, and how many edges they reach. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { CHUNK = 8192, HEADER = 32, ENTRY = 8, KINDS = 3, MOST = 1 << 13 };

void et_bounded_sizes_f32(const float *, int32_t *, int64_t, float, float, int);
void et_bounded_encode_f32(const float *, uint8_t *, const int64_t *, int64_t *, int64_t, float, float, int);
void et_bounded_decode_f32(const uint8_t *, int64_t, float *, int64_t *, int64_t *, int64_t, float, int);

static int64_t chunks_of(int64_t count) { return (count + CHUNK - 1) / CHUNK; }

static void *exactly(size_t bytes) {
    void *made = malloc(bytes ? bytes : 1);
    if (made == NULL) abort();
    return made;
}

/* How many chunks were none, and the values. */
static int64_t decoded(const uint8_t *packed, int64_t bytes, float *out, int64_t count, float e) {
    int64_t *starts = exactly((size_t)(chunks_of(count) + 1) * sizeof *starts), broken = 0;
    et_bounded_decode_f32(packed, bytes, out, starts, &broken, count, e, 1);
    free(starts);
    return broken;
}

static void decode_whole(const uint8_t *data, int64_t size, int64_t count) {
    uint8_t *packed = exactly((size_t)size);
    float *out = exactly((size_t)count * sizeof *out);
    memcpy(packed, data, (size_t)size);
    decoded(packed, size, out, count, 0.01f);
    free(out);
    free(packed);
}

/* The same bytes as chunks, below a table that fits them. */
static void decode_chunks(const uint8_t *data, int64_t size, int64_t count) {
    int64_t chunks = chunks_of(count), first = HEADER + ENTRY * chunks;
    uint8_t *packed = exactly((size_t)(first + size));
    memset(packed, 0, (size_t)first);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        uint32_t bytes = (uint32_t)(size * (chunk + 1) / chunks - size * chunk / chunks);
        memcpy(packed + HEADER + ENTRY * chunk, &bytes, sizeof bytes);
    }
    memcpy(packed + first, data, (size_t)size);
    decode_whole(packed, first + size, count);
    free(packed);
}

/* Packs values; the caller frees. */
static uint8_t *encoded(const float *x, int64_t count, float e, int64_t *bytes) {
    int64_t chunks = chunks_of(count), unfit = 1, *starts = exactly((size_t)(chunks + 1) * sizeof *starts);
    int32_t *sizes = exactly((size_t)chunks * sizeof *sizes);
    float scale = e > 0 ? 0.5f / e : 0;
    et_bounded_sizes_f32(x, sizes, count, e, scale, 1);
    starts[0] = HEADER + ENTRY * chunks;
    for (int64_t i = 0; i < chunks; i++) starts[i + 1] = starts[i] + sizes[i];
    uint8_t *packed = exactly((size_t)starts[chunks]);
    memset(packed, 0, HEADER);
    et_bounded_encode_f32(x, packed, starts, &unfit, count, e, scale, 1);
    if (unfit) abort();
    *bytes = starts[chunks];
    free(starts);
    free(sizes);
    return packed;
}

static void there_and_back(const uint8_t *data, int64_t size, float e) {
    int64_t count = size / (int64_t)sizeof(float), bytes;
    float *x = exactly((size_t)count * sizeof *x), *out = exactly((size_t)count * sizeof *out);
    memcpy(x, data, (size_t)count * sizeof *x);
    uint8_t *packed = encoded(x, count, e, &bytes);
    if (decoded(packed, bytes, out, count, e) != 0) abort();
    for (int64_t i = 0; i < count; i++) {
        double error = (double)x[i] - (double)out[i];
        int same = memcmp(x + i, out + i, sizeof *x) == 0, close = error <= 1.002 * e && -error <= 1.002 * e;
        if (!same && !close) abort();
        if (((x[i] < 0) | (x[i] > 0)) != ((out[i] < 0) | (out[i] > 0))) abort();
    }
    free(packed);
    free(out);
    free(x);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const float halves[] = {0, 1e-5f, 0.01f, 3e9f};
    if (size < 4 || size > MOST) return 0;
    int64_t count = (data[1] | (int64_t)data[2] << 8) % (2 * CHUNK) + 1, rest = (int64_t)size - 4;
    if (data[0] % KINDS == 0) decode_whole(data + 4, rest, count);
    if (data[0] % KINDS == 1) decode_chunks(data + 4, rest, count);
    if (data[0] % KINDS == 2) there_and_back(data + 4, rest, halves[data[3] % 4]);
    return 0;
}

#ifndef ET_LIBFUZZER
enum { EDGES = 1 << 16, KEPT = 4096 };
static uint8_t reached[EDGES], seen[EDGES];
static uintptr_t before;
static uint64_t state;

void __sanitizer_cov_trace_pc(void);
void __sanitizer_cov_trace_pc(void) {
    uintptr_t here = ((uintptr_t)__builtin_return_address(0) >> 1) * 0x9e3779b1u;
    uint8_t *count = &reached[(here ^ before) % EDGES];
    if (*count < 255) ++*count;
    before = here >> 1;
}

static uint32_t drawn(uint32_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32) % below;
}

static struct { uint8_t *data; uint32_t size; } kept[KEPT];
static uint32_t kept_count;

/* Runs an input, and keeps it where it goes over an edge as often (in powers of two) as none before. */
static int try(const uint8_t *data, uint32_t size) {
    int fresh = 0;
    memset(reached, 0, sizeof reached);
    before = 0;
    LLVMFuzzerTestOneInput(data, size);
    for (uint32_t i = 0; i < EDGES; i++) {
        uint8_t bit = (uint8_t)(reached[i] ? 1u << (31 - __builtin_clz(reached[i])) : 0);
        fresh |= bit & ~seen[i];
        seen[i] |= bit;
    }
    if (fresh && kept_count < KEPT) {
        kept[kept_count].data = exactly(size);
        memcpy(kept[kept_count].data, data, size);
        kept[kept_count++].size = size;
    }
    return fresh;
}

static uint32_t mutated(uint8_t *data, uint32_t size) {
    for (uint32_t times = 1 + drawn(4); times > 0; times--) {
        uint32_t at = drawn(size), length = 1 + drawn(size - at < 32 ? size - at : 32);
        switch (drawn(6)) {
        case 0: data[at] ^= (uint8_t)(1u << drawn(8)); break;
        case 1: data[at] = (uint8_t)drawn(256); break;
        case 2: memset(data + at, drawn(2) ? 255 : 0, length); break;
        case 3: memmove(data + at, data + at + length, size - at - length), size -= length; break;
        case 4:
            if (size + length > MOST) break;
            memmove(data + at + length, data + at, size - at);
            size += length;
            break;
        default: {
            uint32_t other = drawn(kept_count), from = drawn(kept[other].size);
            if (length > kept[other].size - from) length = kept[other].size - from;
            memcpy(data + at, kept[other].data + from, length);
        }
        }
        if (size < 4) return 4;
    }
    return size;
}

/* Packed tensors of several kinds, whole and as chunks, and the values themselves. */
static void sow(void) {
    static uint8_t input[4 + MOST + (1 << 17)];
    static float x[600];
    for (int kind = 0; kind < 12; kind++) {
        int64_t count = kind % 3 == 0 ? 1 + drawn(20) : 300 + drawn(300), bytes, walk = 0;
        for (int64_t i = 0; i < count; i++) {
            float value = ((float)drawn(2001) - 1000) / 400;
            walk += (int64_t)drawn(3) - 1;
            x[i] = kind < 3 ? (value > 0 ? value : 0) : kind < 6 ? (float)walk / 40 : kind < 9 ? value * 1e3f : value + 9;
            if (kind > 9 && i % 40 > 30) x[i] = 0;
        }
        uint8_t *packed = encoded(x, count, 0.01f, &bytes);
        uint8_t head[4] = {0, (uint8_t)(count - 1), (uint8_t)((count - 1) >> 8), 2};
        for (int form = 0; form < KINDS; form++) {
            const void *from = form == 0 ? packed : form == 1 ? packed + HEADER + ENTRY : (const uint8_t *)(const void *)x;
            int64_t size = form == 0 ? bytes : form == 1 ? bytes - HEADER - ENTRY : count * (int64_t)sizeof *x;
            head[0] = (uint8_t)form;
            memcpy(input, head, 4);
            memcpy(input + 4, from, (size_t)size);
            try(input, (uint32_t)size + 4);
        }
        free(packed);
    }
}

int main(int count, char **arguments) {
    double seconds = count > 1 ? atof(arguments[1]) : 1;
    state = 0x9e3779b97f4a7c15u + (uint64_t)(count > 2 ? atoll(arguments[2]) : 0);
    static uint8_t input[MOST + 64];
    clock_t start = clock();
    sow();
    uint32_t sown = kept_count;
    long runs = 0;
    for (; (double)(clock() - start) / CLOCKS_PER_SEC < seconds; runs++) {
        uint32_t chosen = drawn(kept_count), size = kept[chosen].size;
        memcpy(input, kept[chosen].data, size);
        try(input, mutated(input, size));
    }
    int edges = 0;
    for (int i = 0; i < EDGES; i++) edges += seen[i] != 0;
    printf("%ld %u %u %d\n", runs, sown, kept_count, edges);
    for (uint32_t i = 0; i < kept_count; i++) free(kept[i].data);
    return 0;
}
#endif
