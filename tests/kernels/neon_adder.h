/* The adder convolutions' part of neon_check.c: layers of every kind on made-up numbers. */
void et_adder_conv_f32(const float *, const float *, float *, float *, const I *, int);
void et_adder_conv_input_gradient_f32(const float *, const float *, const float *, float *, float *, const I *, int);
void et_adder_conv_u8_f32(const uint8_t *, const uint8_t *, int32_t *, uint8_t *, const I *, int);
void et_adder_conv_steps_f32(const float *, const uint8_t *, const int32_t *, const float *, const float *, float *,
                             uint8_t *, float *, const I *, int);

/* n c h w o, kernel, stride, padding before and behind (rows, columns), dilation, groups */
static const I ADDERS[][18] = {
    {2, 16, 7, 7, 16, 3, 3, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1}, {1, 5, 9, 8, 7, 3, 2, 0, 0, 2, 1, 0, 1, 2, 1, 1, 2, 1},
    {2, 12, 6, 5, 10, 1, 1, 0, 0, 2, 3, 0, 0, 0, 0, 1, 1, 2}, {1, 13, 8, 9, 13, 3, 3, 0, 0, 1, 2, 1, 1, 1, 1, 1, 1, 13},
    {3, 8, 1, 1, 24, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1}, {1, 21, 5, 6, 33, 5, 5, 0, 0, 1, 1, 2, 2, 2, 3, 1, 1, 3}};

/* Whole sixteenths add up exactly. */
static void check_adders(float *x, const uint8_t *bytes) {
    float *y = room(), *scratch = room();
    int32_t *sums = room();
    uint8_t *map = room();
    int32_t members[40];
    for (int k = 0; k < 40; k++) members[k] = k ^ 1;
    for (I i = 0; i < ROOM; i++) x[i] = (float)((int)(next() >> 8) % 65) / 16.0f;
    for (int k = 0; k < 6; k++)
        for (int last = 0; last < 2; last++) {
            I s[24], i = ADDERS[k][1] / ADDERS[k][17];
            memcpy(s, ADDERS[k], sizeof ADDERS[k]);
            s[7] = (s[2] + s[11] + s[13] - s[15] * (s[5] - 1) - 1) / s[9] + 1;
            s[8] = (s[3] + s[12] + s[14] - s[16] * (s[6] - 1) - 1) / s[10] + 1;
            I taps = s[5] * s[6], outs = s[0] * s[4] * s[7] * s[8], steps[] = {i * taps, last ? 1 : taps, last ? i : 1, last};
            memcpy(s + 18, steps, sizeof steps);
            et_adder_conv_f32(x, x + 5003, y, scratch, s, 2);
            show("adder_conv", y, outs * sizeof *y);
            et_adder_conv_input_gradient_f32(x + 20011, x, x + 5003, y, scratch, s, 2);
            show("adder_conv gx", y, s[0] * s[1] * s[2] * s[3] * sizeof *y);
            s[18] = 77;
            et_adder_conv_u8_f32(bytes, bytes + 7001, sums, (uint8_t *)scratch, s, 2);
            show("adder_conv_u8", sums, outs * sizeof *sums);
            if (s[17] > 1 || s[4] % 2) continue;
            I groups[] = {last ? 15 : 255, last, 2, 5, s[4] - 5};
            float step[] = {0.0625f, 0.25f};
            memcpy(s + 18, groups, sizeof groups);
            et_adder_conv_steps_f32(x, bytes + 7001, members, step, x + 99, y, map, scratch, s, 1 + last);
            show("adder_conv_steps", y, outs * sizeof *y);
        }
    free(y); free(scratch); free(sums); free(map);
}
