/* A map in a frame of its padding: x (n h w c) -> out (n top+h+bottom left+w+right groups room), elements of any size.
 *
 * Padding has the byte `value` everywhere; channels that fill a group up to `room` are 0. */
#include "adder.h"

typedef struct {
    const layer *l;
    const char *x;
    char *out;
    int64_t used, room;  /* bytes of a group, in x and in out */
    int value;
} frame;

static void frame_pixels(const frame *f, char *to, const char *from, int64_t pixels) {
    if (f->used == f->room) {
        size_t bytes = (size_t)(pixels * f->l->groups * f->room);
        if (from) memcpy(to, from, bytes);
        else memset(to, f->value, bytes);
        return;
    }
    for (int64_t i = 0; i < pixels * f->l->groups; i++, to += f->room) {
        if (from) memcpy(to, from + i * f->used, (size_t)f->used);
        else memset(to, f->value, (size_t)f->used);
        memset(to + f->used, 0, (size_t)(f->room - f->used));
    }
}

/* Items are rows of out. */
static void frame_rows(const void *job, int64_t begin, int64_t end) {
    const frame *f = job;
    const layer *l = f->l;
    int64_t rows = rows_of(l), columns = columns_of(l), pixel = l->groups * f->room;
    for (int64_t row = begin; row < end; row++) {
        char *to = f->out + row * columns * pixel;
        int64_t at = row % rows - l->top, sample = row / rows;
        if (at < 0 || at >= l->h) {
            frame_pixels(f, to, NULL, columns);
            continue;
        }
        frame_pixels(f, to, NULL, l->left);
        frame_pixels(f, to + l->left * pixel, f->x + (sample * l->h + at) * l->w * l->groups * f->used, l->w);
        frame_pixels(f, to + (l->left + l->w) * pixel, NULL, l->right);
    }
}

/* x itself where it needs no frame, else out. */
static const void *framed(const layer *l, const void *x, void *out, int64_t used, int64_t room, int value,
                          int threads) {
    if (used == room && l->top + l->left + l->bottom + l->right == 0) return x;
    frame job = {l, x, out, used, room, value};
    int64_t rows = l->n * rows_of(l);
    et_parallel(frame_rows, &job, rows, rows * columns_of(l) * l->groups * room, threads);
    return out;
}
