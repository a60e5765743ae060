/* Unit tests of run.c, built once for each instruction set that this machine has:
 *
 *     unit            lists the tests
 *     unit NAME       runs one; exit status 0, or 1 with the first failed check on standard error
 */
#define NO_MAIN
#include "../run.c"

#define CHECK(condition, ...)                                                                                          \
    do                                                                                                                 \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                                            \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    while (0)

static uint64_t seed = 1; // of all random data: the tests are the same each time

static float uniform(void) { return (float)(2 * random_number(&seed) - 1); }

static uint16_t narrowed(Dtype dtype, float value) { return dtype == BF16 ? f32_to_bf16(value) : f32_to_f16(value); }

// n random numbers of any type, which start `shift` elements behind a cache line's start.
static void *random_array(Dtype dtype, size_t n, size_t shift) {
    char *array = allocate(n + shift, 4, "a test");
    void *start = array + shift * (dtype == F32 ? 4 : 2);
    for (size_t i = 0; i < n; i++)
        if (dtype == F32)
            ((float *)start)[i] = uniform();
        else
            ((uint16_t *)start)[i] = narrowed(dtype, uniform());
    return start; // the tests are short-lived: nothing is freed
}

static double exact_dot(const void *a, Dtype a_type, const void *b, Dtype b_type, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)element(a, a_type, i) * (double)element(b, b_type, i);
    return sum;
}

// The pairs of types that dot and tile take, the last one where the CPU has an instruction for it.
static const Dtype PAIRS[][2] = {{F32, F32}, {BF16, F32}, {F16, F32}, {BF16, BF16}};

static size_t n_pairs(void) { return has_bf16_dot() ? 4 : 3; }

// ---- numbers

static double f16_value(uint16_t h) { // by the definition of IEEE 754
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double magnitude = exponent == 0    ? ldexp(fraction, -24)
                       : exponent == 31 ? (fraction ? NAN : INFINITY)
                                        : ldexp(1024 + fraction, exponent - 25);
    return h & 0x8000 ? -magnitude : magnitude;
}

static void test_f16_all_values(void) {
    for (uint32_t h = 0; h < 65536; h++) {
        float value = f16_to_f32((uint16_t)h);
        double expected = f16_value((uint16_t)h);
        CHECK(isnan(expected) ? isnan(value) : (double)value == expected, "%04x is %g", h, (double)value);
        CHECK(!signbit(value) == !signbit(expected), "sign of %04x", h);
        CHECK(isnan(value) ? (f32_to_f16(value) & 0x7fff) > 0x7c00 : f32_to_f16(value) == h, "%04x and back", h);
    }
}

// What is between two neighbours goes to the nearer one, and the middle to the even one.
static void test_f16_rounding(void) {
    for (uint32_t h = 0; h < 0x7c00; h++) {
        double low = f16_value((uint16_t)h), high = h == 0x7bff ? 65536 : f16_value((uint16_t)(h + 1));
        float middle = (float)((low + high) / 2);
        uint32_t even = h % 2 ? h + 1 : h;
        CHECK(f32_to_f16(middle) == even, "the middle above %04x", h);
        CHECK(f32_to_f16(nextafterf(middle, 0)) == h, "below the middle above %04x", h);
        CHECK(f32_to_f16(nextafterf(middle, 1e9f)) == h + 1, "above the middle above %04x", h);
        CHECK(f32_to_f16(-middle) == (even | 0x8000), "the middle below -%04x", h);
    }
    CHECK(f32_to_f16(1e9f) == 0x7c00 && f32_to_f16(INFINITY) == 0x7c00, "infinity");
    CHECK(f32_to_f16(1e-30f) == 0 && f32_to_f16(-1e-30f) == 0x8000, "zero");
}

static void test_bf16(void) {
    for (uint32_t h = 0; h < 65536; h++) {
        float value = bf16_to_f32((uint16_t)h);
        CHECK(bits_of(value) == h << 16, "%04x", h);
        CHECK(isnan(value) ? (f32_to_bf16(value) & 0x7fff) > 0x7f80 : f32_to_bf16(value) == h, "%04x and back", h);
        if ((h & 0x7f80) != 0x7f80) {
            CHECK(f32_to_bf16(float_of(h << 16 | 0x8000)) == h + h % 2, "the middle above %04x", h);
            CHECK(f32_to_bf16(float_of(h << 16 | 0x7fff)) == h, "below the middle above %04x", h);
            CHECK(f32_to_bf16(float_of(h << 16 | 0x8001)) == h + 1, "above the middle above %04x", h);
        }
    }
    CHECK(isnan(bf16_to_f32(f32_to_bf16(float_of(0x7f800001)))), "a NaN whose fraction has low bits only");
}

static void test_exp(void) {
    for (double x = 0; x > -87; x -= 0.00037) {
        double expected = exp((double)(float)x), found = (double)exp_negative((float)x);
        double ulp = (double)nextafterf((float)expected, 2) - (double)(float)expected;
        CHECK(fabs(found - expected) <= 3 * ulp, "e^%g is %.9g, not %.9g", x, expected, found);
    }
    CHECK(exp_negative(0) == 1 && exp_negative(-INFINITY) == 0 && exp_negative(-88) == 0, "the ends");
    CHECK(isnan(exp_negative(NAN)), "NaN");
}

// ---- kernels against their plain forms

// start + a . b
static float dot(float start, const void *a, Dtype ta, const void *b, Dtype tb, size_t n) {
    multiply(&start, 1, (Tensor){a, ta, 1, n, n}, (Tensor){b, tb, 1, n, n}, true);
    return start;
}

static void test_dot(void) {
    for (size_t n = 0; n < 300; n++)
        for (size_t p = 0; p < n_pairs(); p++)
            for (size_t shift = 0; shift < 3; shift++) {
                Dtype ta = PAIRS[p][0], tb = PAIRS[p][1];
                const void *a = random_array(ta, n, shift), *b = random_array(tb, n, 2 * shift);
                double expected = exact_dot(a, ta, b, tb, n), found = (double)dot(0, a, ta, b, tb, n);
                double plain = (double)dot_ref(a, ta, b, tb, n), bound = 1e-6 * (double)(n + 1);
                CHECK(fabs(found - expected) <= bound, "types %zu, n %zu: %g, not %g", p, n, found, expected);
                CHECK(fabs(plain - expected) <= bound, "dot_ref, types %zu, n %zu", p, n);
            }
}

// Tiles and pairs of rows give the same bits as dot: this is why neither a batch's size nor the threads matter.
static void test_multiply_has_the_bits_of_dot(void) {
    enum { MOST = TILE_ROWS * GROUP + 1 }; // the first number that counts as many, see multiply
    for (size_t n = 1; n < 3100; n += n < 140 ? 1 : 977)
        for (size_t p = 0; p < n_pairs(); p++)
            for (size_t tokens = 1; tokens <= MOST; tokens += tokens <= TILE_TOKENS ? 1 : MOST - TILE_TOKENS - 1) {
                Dtype w_type = PAIRS[p][0], x_type = PAIRS[p][1];
                enum { STRIDE = 2 * TILE_ROWS };
                size_t rows = 1 + n % (STRIDE - 1);
                Tensor w = {random_array(w_type, rows * (n + 1), 0), w_type, rows, n, n + 1};
                Tensor x = {random_array(x_type, tokens * (n + 2), n % 3), x_type, tokens, n, n + 2};
                float out[MOST + 1][STRIDE];
                for (size_t i = 0; i < sizeof out / sizeof out[0][0]; i++)
                    out[i / STRIDE][i % STRIDE] = 0.75f;
                bool add = n % 2;
                multiply(out[0], STRIDE, w, x, add);
                for (size_t t = 0; t < MOST + 1; t++)
                    for (size_t r = 0; r < STRIDE; r++) {
                        float expected = 0.75f;
                        if (t < tokens && r < rows)
                            expected = dot(add ? 0.75f : 0, part(w, r, 1, 0, n).data, w_type, part(x, t, 1, 0, n).data,
                                           x_type, n);
                        CHECK(bits_of(out[t][r]) == bits_of(expected), "n %zu, row %zu, token %zu: %g, not %g", n, r, t,
                              (double)out[t][r], (double)expected);
                    }
            }
}

// The vectors that products are made of, of every bit pattern.
static void test_load(void) {
    for (Dtype dtype = BF16; dtype <= F16; dtype++)
        for (uint32_t h = 0; h < 65536; h += W) {
            uint16_t in[W];
            float out[W];
            for (uint32_t i = 0; i < W; i++)
                in[i] = (uint16_t)(h + i);
            store(out, load(in, dtype, false, 0));
            for (uint32_t i = 0; i < W; i++) {
                double expected = dtype == F16 ? f16_value(in[i]) : (double)bf16_to_f32(in[i]);
                CHECK(isnan(expected) ? isnan(out[i]) : (double)out[i] == expected, "type %d, %04x", dtype, h + i);
            }
        }
}

static void test_weigh(void) {
    for (size_t n = 1; n < 150; n += n < 70 ? 1 : 13)
        for (size_t m = 0; m < 70; m += 1 + m / 3)
            for (size_t P = 1; P <= (has_bf16_dot() ? 2 : 1); P++) { // numbers of a pair
                const Dtype a_type = P == 2 ? BF16 : F32, x_type = P == 2 ? BF16 : F16;
                float y[QUERY_TILE][152], alone[152];
                const size_t stride = m + 1; // of a
                float *a = random_array(a_type, P * QUERY_TILE * stride, 0);
                const uint16_t *x = random_array(x_type, P * (m * n + 16), 1); // the most that weigh reads beyond
                for (size_t q = 0; q < QUERY_TILE; q++)
                    for (size_t c = 0; c < 152; c++)
                        y[q][c] = (float)c;
                weigh(y[0], 152, a, stride, QUERY_TILE, x, P == 2, m, n);
                for (size_t q = 0; q < QUERY_TILE; q++) {
                    float plain[152];
                    for (size_t c = 0; c < 152; c++)
                        plain[c] = alone[c] = (float)c;
                    for (size_t j = 0; j < m * P; j++)
                        for (size_t c = 0; c < n; c++)
                            plain[c] +=
                                element(a + q * stride, a_type, j) * element(x, x_type, (j / P * n + c) * P + j % P);
                    weigh(alone, 152, a + q * stride, stride, 1, x, P == 2, m, n);
                    for (size_t c = 0; c < 152; c++) {
                        CHECK(fabsf(y[q][c] - plain[c]) <= 3e-5f * (float)(P * m + 1), "m %zu, n %zu, column %zu", m, n,
                              c);
                        CHECK(bits_of(y[q][c]) == bits_of(alone[c]), "the bits of a query alone: m %zu, n %zu", m, n);
                    }
                }
            }
}

// What matmul needs for T tokens and such weights.
static State workspace(Dtype dtype, size_t T, size_t cols) {
    State s = {.threads = 1, .input_type = dtype == BF16 && has_bf16_dot() ? BF16 : F32};
    s.scratch_size = TILE_BLOCK * TILE_COLUMNS / 2;
    size_t room = multiple_of(SQUARE, T) * input_stride(cols);
    s.input = allocate(room, sizeof(float), "a test");
    memset(s.input, 0xff, room * sizeof(float)); // NaN, which nobody shall use
    s.scratch = allocate(s.scratch_size, sizeof *s.scratch, "a test");
    return s;
}

// out (T, rows) = w . x, or += it, for x (T, cols)
static void product(float *out, const float *x, Tensor w, size_t T, bool add, State *s) {
    for (size_t t = 0; t < T; t++)
        put_input(s, w.cols, t, 0, x + t * w.cols, w.cols);
    matmul(out, w, T, add, s);
}

static void test_matmul(void) {
    for (size_t p = 1; p < 3; p++) // weights in bf16, f16
        for (size_t cols = 1; cols < 700; cols += 1 + cols / 2)
            for (size_t rows = 1; rows < 150; rows += 1 + rows / 2)
                for (size_t T = 1; T < 30; T += T < 8 ? 1 : 5) {
                    Dtype dtype = PAIRS[p][0];
                    Tensor w = {random_array(dtype, rows * cols, 0), dtype, rows, cols, cols};
                    float *x = random_array(F32, T * cols, 0), *out = random_array(F32, T * rows + 1, 0);
                    float *before = allocate(T * rows + 1, sizeof *out, "a test");
                    memcpy(before, out, (T * rows + 1) * sizeof *out);
                    State s = workspace(PAIRS[p][0], T, cols);
                    bool add = T % 2;
                    product(out, x, w, T, add, &s);
                    for (size_t t = 0; t < T; t++)
                        for (size_t r = 0; r < rows; r++) {
                            const void *row = address(w.data, dtype, r * cols);
                            double expected = exact_dot(row, dtype, x + t * cols, F32, cols);
                            expected += add ? (double)before[t * rows + r] : 0;
                            double rounding = dtype == BF16 && has_bf16_dot() ? 0.004 : 1e-6;
                            CHECK(fabs((double)out[t * rows + r] - expected) <= rounding * (double)(cols + 1),
                                  "%zu x %zu, token %zu of %zu, row %zu", rows, cols, t, T, r);
                        }
                    CHECK(out[T * rows] == before[T * rows], "wrote behind the end");
                    free(s.input);
                    free(s.scratch);
                    free(before);
                }
}

// Rows longer than a chunk, too, and products below the least normal number: one token's are the same bits in every batch.
static void test_matmul_has_the_same_bits_in_any_batch(void) {
    const size_t batches[] = {2, TILE_TOKENS - 1, TILE_TOKENS, TILE_TOKENS + 1, 20, SQUARE + 1, 70};
    for (size_t p = 1; p < 3; p++) // weights in bf16, f16
        for (size_t cols = 1000; cols < 5500; cols += 743)
            for (size_t i = 0; i < sizeof batches / sizeof *batches; i++) {
                enum { ROWS = 70 };
                size_t T = batches[i];
                Tensor w = {random_array(PAIRS[p][0], ROWS * cols, 0), PAIRS[p][0], ROWS, cols, cols};
                float *x = random_array(F32, T * cols, 0), *out = random_array(F32, T * ROWS, 0), one[ROWS];
                for (size_t j = 0; j < T * cols && i % 4 == 2; j++)
                    x[j] *= 0x1p-124f;
                State s = workspace(PAIRS[p][0], T, cols);
                bool add = T % 2;
                float *before = allocate(T * ROWS, sizeof *out, "a test");
                memcpy(before, out, T * ROWS * sizeof *out);
                product(out, x, w, T, add, &s);
                for (size_t t = 0; t < T; t++) {
                    memcpy(one, before + t * ROWS, sizeof one);
                    product(one, x + t * cols, w, 1, add, &s);
                    CHECK(!memcmp(one, out + t * ROWS, sizeof one), "%zu columns, token %zu of %zu", cols, t, T);
                }
                free(s.input);
                free(s.scratch);
                free(before);
            }
}

// The activations of a batch and the logits together take no more than BATCH_BYTES.
static void test_room_for_a_batch(void) {
    Model m = {.file.path = "a test", .q_dim = 2048, .kv_dim = 256};
    m.h = (Header){.dtype = BF16, .dim = 2048, .hidden_dim = 5632, .n_layers = 1, .n_heads = 32, .n_kv_heads = 4};
    m.h.head_dim = 64;
    m.h.vocab_size = 150000;
    for (size_t rows = 1; rows <= SCORED_AT_ONCE; rows += SCORED_AT_ONCE - 1) {
        State s = open_state(&m, 512, rows, 1);
        size_t token = (2048 + 2 * 5632 + 64) * sizeof(float) + input_stride(5632) * size_of(s.input_type);
        size_t bytes = s.batch * token + rows * m.h.vocab_size * sizeof(float);
        bool most = s.batch == MAX_BATCH || bytes + token > BATCH_BYTES;
        CHECK(bytes <= BATCH_BYTES && most, "%zu tokens, %zu logits: %zu bytes", s.batch, rows, bytes);
        munmap(s.k, (size_t)(2 * cache_bytes(&m, 512)) + 64);
        float *const memory[] = {s.x, s.gate_up, s.logits, s.cosine, s.sine, s.scratch, s.input};
        for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
            free(memory[i]);
    }
}

static void test_rmsnorm(void) {
    for (size_t n = 1; n < 100; n++) {
        float *x = random_array(F32, n, 1);
        Tensor weight = {random_array(BF16, n, 0), BF16, 1, n, n};
        State s = workspace(F16, 1, n);
        rmsnorm(&s, x, weight, 1, 0.01f);
        const float *out = s.input;
        double mean = exact_dot(x, F32, x, F32, n) / (double)n;
        for (size_t i = 0; i < n; i++) {
            double expected = (double)x[i] / sqrt(mean + 0.01) * (double)element(weight.data, BF16, i);
            CHECK(fabs((double)out[i] - expected) < 1e-5, "element %zu of %zu", i, n);
        }
    }
}

static void test_swiglu(void) {
    enum { F = 37 };
    float in[2 * F];
    for (size_t i = 0; i < 2 * F; i++)
        in[i] = 20 * uniform();
    in[0] = 200;
    in[1] = -200;
    in[2] = 0;
    State s = workspace(F16, 1, F);
    s.gate_up = in;
    swiglu(&s, 1, F);
    const float *out = s.input;
    for (size_t i = 0; i < F; i++) {
        double g = (double)in[i], expected = g / (1 + exp(-g)) * (double)in[F + i];
        CHECK(fabs((double)out[i] - expected) <= 1e-6 * (1 + fabs(expected)), "silu(%g)", g);
    }
}

// The online softmax over blocks is the softmax over all.
static void test_soften(void) {
    for (size_t n = 1; n < 300; n += 7) {
        float max = -INFINITY, sum = 0, p[320], raw[320];
        for (size_t start = 0; start < n; start += KEYS) {
            for (size_t j = 0; j < KEYS; j++) // what is not visible may be anything
                p[start + j] = raw[start + j] = start + j < n ? 30 * uniform() : NAN;
            float shrink = soften(p + start, smaller(KEYS, n - start), 0.5f, &max, &sum);
            for (size_t j = 0; j < start; j++)
                p[j] *= shrink;
        }
        double exact = 0, largest = -1e9;
        for (size_t j = 0; j < n; j++)
            largest = fmax(largest, (double)raw[j] / 2);
        for (size_t j = 0; j < n; j++)
            exact += exp((double)raw[j] / 2 - largest);
        for (size_t j = 0; j < n; j++) {
            double expected = exp((double)raw[j] / 2 - largest) / exact, found = (double)p[j] / (double)sum;
            CHECK(fabs(found - expected) < 2e-6, "%zu of %zu: %g, not %g", j, n, found, expected);
        }
        CHECK(n % KEYS == 0 || p[n] == 0, "an invisible key has a weight");
    }
}

static void test_rope_frequency(void) {
    Header h = {.head_dim = 8, .rope_theta = 10000};
    const double plain[] = {1, 0.1, 0.01, 0.001};
    for (size_t i = 0; i < 4; i++) {
        h.rope_scaling = ROPE_PLAIN;
        CHECK(fabs((double)rope_frequency(&h, i) - plain[i]) < 1e-7, "pair %zu", i);
        h.rope_scaling = ROPE_LINEAR;
        h.rope_factor = 4;
        CHECK(fabs((double)rope_frequency(&h, i) - plain[i] / 4) < 1e-7, "pair %zu, linear", i);
    }
    h = (Header){.head_dim = 8, .rope_theta = 10000, .rope_scaling = ROPE_LLAMA3, .rope_factor = 8};
    h.rope_low_freq_factor = 1;
    h.rope_high_freq_factor = 4;
    h.rope_original_max_seq_len = 1024; // pairs turn 163, 16.3, 1.63 and 0.163 times within it
    CHECK(rope_frequency(&h, 0) == 1.0f, "a fast pair stays");
    CHECK(fabs((double)rope_frequency(&h, 3) - 0.001 / 8) < 1e-9, "a slow pair is slowed down");
    double keep = (1024 * 0.01 / (2 * 3.14159265358979) - 1) / 3;
    CHECK(fabs((double)rope_frequency(&h, 2) - (keep * 0.01 + (1 - keep) * 0.01 / 8)) < 1e-8, "one in between");
}

// ---- sampling

static Sampler sampler(float temperature, float top_p, size_t top_k, size_t n) {
    Sampler s = {.temperature = temperature, .top_p = top_p, .top_k = top_k, .random = 7};
    s.kept = allocate(n, sizeof *s.kept, "a test");
    s.probabilities = allocate(n, sizeof *s.probabilities, "a test");
    return s;
}

static void test_random_numbers(void) { // splitmix64's published first numbers for the seed 1234567
    uint64_t state = 1234567;
    const uint64_t expected[] = {6457827717110365317u, 3203168211198807973u, 9817491932198370423u};
    for (int i = 0; i < 3; i++)
        CHECK(random_number(&state) == (double)(expected[i] >> 11) * 0x1p-53, "number %d", i);
}

static void test_heap(void) {
    Heap heap = {0};
    for (uint32_t i = 0; i < 1000; i++)
        heap_push(&heap, (Item){.key = (float)(int)(20 * uniform()), .index = i});
    Item last = heap_pop(&heap);
    while (heap.n) {
        Item next = heap_pop(&heap);
        CHECK(above(last, next), "%g %u before %g %u", (double)last.key, last.index, (double)next.key, next.index);
        last = next;
    }
}

static void test_greedy(void) {
    float logits[] = {1, 3, -2, 3, 0};
    Sampler s = sampler(0, 0.9f, 0, 5);
    CHECK(sample(&s, logits, 5) == 1, "the first of the likeliest");
    float one[] = {-5};
    Sampler hot = sampler(2, 0.9f, 3, 1);
    CHECK(sample(&hot, one, 1) == 0, "a vocabulary of one");
    float cold[] = {1, 2, 3};
    Sampler tiny = sampler(1e-30f, 1, 0, 3);
    CHECK(sample(&tiny, cold, 3) == 2, "a temperature close to 0");
}

// Draws often, and compares with the distribution by a chi-squared test: 0.9999 of all seeds would pass.
static void check_distribution(float temperature, float top_p, size_t top_k, const double *expected, size_t n) {
    enum { DRAWS = 200000 };
    float logits[16];
    static const double p[] = {0.4, 0.25, 0.15, 0.1, 0.06, 0.04};
    for (size_t i = 0; i < n; i++)
        logits[i] = (float)(log(p[(i + 2) % n])) + 3; // not in the order of their probability
    Sampler s = sampler(temperature, top_p, top_k, n);
    size_t count[16] = {0};
    for (int i = 0; i < DRAWS; i++)
        count[(sample(&s, logits, n) + 2) % n]++;
    double chi = 0;
    for (size_t i = 0; i < n; i++) {
        double mean = expected[i] * DRAWS;
        CHECK(expected[i] > 0 || count[i] == 0, "token %zu was drawn %zu times", i, count[i]);
        chi += expected[i] > 0 ? ((double)count[i] - mean) * ((double)count[i] - mean) / mean : 0;
    }
    CHECK(chi < 26, "t %g, p %g, k %zu: chi-squared %g", (double)temperature, (double)top_p, top_k, chi);
}

static void test_distribution(void) {
    const double all[] = {0.4, 0.25, 0.15, 0.1, 0.06, 0.04};
    check_distribution(1, 1, 0, all, 6);
    check_distribution(1, 0, 0, all, 6);
    check_distribution(1, 0.999f, 0, all, 6);
    check_distribution(1, 1, 6, all, 6);
    check_distribution(1, 1, 100, all, 6);
    const double top3[] = {0.5, 0.3125, 0.1875, 0, 0, 0};
    check_distribution(1, 1, 3, top3, 6);
    check_distribution(1, 0.79f, 0, top3, 6); // 0.4 + 0.25 is not enough, 0.8 is
    check_distribution(1, 0.66f, 0, top3, 6);
    const double top2[] = {0.4 / 0.65, 0.25 / 0.65, 0, 0, 0, 0};
    check_distribution(1, 0.64f, 0, top2, 6);
    check_distribution(1, 0.8f, 3, top2, 6); // 0.65 / 0.8 of what top-k left is 0.8125
    check_distribution(1, 0.82f, 3, top3, 6);
    const double top1[] = {1, 0, 0, 0, 0, 0};
    check_distribution(1, 0.1f, 0, top1, 6);
    check_distribution(1, 0.5f, 1, top1, 6);
    double squares[6], sum = 0; // a temperature of 1/2 squares the probabilities
    for (size_t i = 0; i < 6; i++)
        sum += squares[i] = all[i] * all[i];
    for (size_t i = 0; i < 6; i++)
        squares[i] /= sum;
    check_distribution(0.5f, 1, 0, squares, 6);
}

static void test_log_probability(void) {
    const float logits[] = {1000, 999, -1000};
    CHECK(fabs(log_probability(logits, 3, 0) + log(1 + exp(-1))) < 1e-9, "the likeliest");
    CHECK(fabs(log_probability(logits, 3, 2) + 2000 + log(1 + exp(-1))) < 1e-6, "the least likely");
}

// ---- a model larger than memory

#ifdef __linux__
enum { N_PIECES = 6 };

// Has the system forget pieces of the file.
static void forget(const Paging *p, size_t first, size_t last) {
    uint8_t all[N_PIECES] = {2, 2, 2, 2, 2, 2};
    for (size_t i = first; i <= last; i++)
        let_go(&(Paging){.m = p->m, .missing = all, .spared = SIZE_MAX}, i);
}

static double part_in_memory(const Paging *p, size_t piece) {
    unsigned char pages[PIECE_BYTES / MIN_PAGE];
    size_t n = PIECE_BYTES / (size_t)sysconf(_SC_PAGESIZE), found = 0;
    CHECK(!mincore((unsigned char *)p->m->file.bytes + piece * PIECE_BYTES, PIECE_BYTES, pages), "%s", strerror(errno));
    for (size_t i = 0; i < n; i++)
        found += pages[i] & 1;
    return (double)found / (double)n;
}

// Reads the file as a pass does, by tensors of 3 MB and a little, from the second piece on.
static void read_file(Paging *p) {
    volatile unsigned char read = 0;
    size_t n;
    for (size_t at = PIECE_BYTES; at < p->m->file.n; at += n) {
        n = smaller((3 << 20) + 64, p->m->file.n - at);
        turn_pages(p, (Tensor){p->m->file.bytes + at, BF16, 1, n / 2, n / 2});
        for (size_t i = 0; i < n; i += MIN_PAGE)
            read = p->m->file.bytes[at + i];
    }
    (void)read;
}

static size_t n_missing(const Paging *p) {
    size_t n = 0;
    for (size_t i = 0; i < N_PIECES; i++)
        n += p->missing[i] > 0;
    return n;
}

static void test_paging(void) {
    char name[] = "paging.XXXXXX", *ones = allocate(PIECE_BYTES, 1, "a test");
    int fd = mkstemp(name);
    CHECK(fd >= 0 && !unlink(name), "%s: %s", name, strerror(errno));
    memset(ones, 1, PIECE_BYTES);
    for (size_t i = 0; i < N_PIECES; i++)
        CHECK(write(fd, ones, PIECE_BYTES) == PIECE_BYTES, "cannot write 96 MB");
    CHECK(!fsync(fd), "%s", strerror(errno)); // the system does not forget what is not on the disk
    Model m = {.file.fd = fd, .file.n = N_PIECES * PIECE_BYTES};
    m.file.bytes = mmap(NULL, m.file.n, PROT_READ, MAP_SHARED, fd, 0);
    uint8_t missing[N_PIECES] = {0};
    Paging p = {.m = &m, .at = m.file.n, .waits = LONG_MAX, .missing = missing};
    forget(&p, 0, N_PIECES - 1);
    if (part_in_memory(&p, 3) > 0)
        exit(77); // the disk is memory, say

    read_file(&p);
    CHECK(!p.active && part_in_memory(&p, 3) == 1, "the first pass lets nothing go");
    read_file(&p);
    CHECK(p.active && n_missing(&p) == 0 && part_in_memory(&p, 3) == 1, "the second finds all in memory");
    read_file(&p);
    CHECK(!p.active, "pages were read in the second pass");
    forget(&p, 1, 3);
    read_file(&p);
    CHECK(!p.active && part_in_memory(&p, 3) == 1, "something was let go before it was known that memory is short");
    for (size_t pass = 1; pass <= 2; pass++) {
        forget(&p, 1, 3);
        forget(&p, 5, 5);
        read_file(&p);
        CHECK(p.active && n_missing(&p) == 4, "%zu pieces were missing, not 4", n_missing(&p));
        CHECK(part_in_memory(&p, 2) == (pass == 1), "a piece shall be let go when it was missing twice in a row");
    }
    turn_pages(&p, (Tensor){p.m->file.bytes + PIECE_BYTES, BF16, 1, 1, 1}); // the next pass begins
    CHECK(part_in_memory(&p, 1) == 1, "the first missing piece shall stay");
    CHECK(part_in_memory(&p, 4) == 1, "what was in memory shall stay");
    for (size_t piece = 2; piece < N_PIECES; piece += piece == 3 ? 2 : 1)
        CHECK(part_in_memory(&p, piece) < 0.5, "piece %zu, which had to be read, shall be let go", piece);
}
#endif

// ---- text

static int length_of(const char *bytes, size_t n) { return utf8_length((Text){(const unsigned char *)bytes, n}); }

static void test_utf8(void) {
    CHECK(length_of("a", 1) == 1 && length_of("\x7f", 1) == 1 && length_of("\0", 1) == 1, "ASCII");
    CHECK(length_of("\xc3\xa9", 2) == 2 && length_of("\xe2\x96\x81", 3) == 3, "two and three bytes");
    CHECK(length_of("\xf0\x9f\x98\x80", 4) == 4 && length_of("\xf4\x8f\xbf\xbf", 4) == 4, "four bytes");
    CHECK(length_of("\xc3", 1) == -1 && length_of("\xe2\x96", 2) == -1 && length_of("\xf0\x9f\x98", 3) == -1, "cut");
    CHECK(length_of("\x80", 1) == 0 && length_of("\xff", 1) == 0 && length_of("\xfe", 1) == 0, "stray");
    CHECK(length_of("\xc0\xaf", 2) == 0 && length_of("\xe0\x80\xaf", 3) == 0, "overlong");
    CHECK(length_of("\xf0\x80\x80\xaf", 4) == 0 && length_of("\xc1\xbf", 2) == 0, "overlong");
    CHECK(length_of("\xed\xa0\x80", 3) == 0 && length_of("\xed\x9f\xbf", 3) == 3, "surrogates");
    CHECK(length_of("\xf4\x90\x80\x80", 4) == 0 && length_of("\xf5\x80\x80\x80", 4) == 0, "beyond U+10FFFF");
    CHECK(length_of("\xc3\x28", 2) == 0 && length_of("\xe2\x28\xa1", 3) == 0, "no continuation");
    size_t valid = 0; // of all byte sequences that are one character, as many as there are scalar values
    for (uint32_t i = 0; i < 0x1000000; i++) {
        char bytes[4] = {(char)(i >> 16), (char)(i >> 8), (char)i, 0};
        if (length_of(bytes, 3) == 3)
            valid++;
    }
    CHECK(valid == 0x10000 - 0x800 - 0x800, "%zu characters of three bytes", valid);
}

// ---- the file formats, as the README documents them

static void test_layout(void) {
    CHECK(offsetof(Header, version) == 8 && offsetof(Header, dtype) == 12 && offsetof(Header, flags) == 16, "Header");
    CHECK(offsetof(Header, dim) == 20 && offsetof(Header, head_dim) == 40 && offsetof(Header, max_seq_len) == 48, " ");
    CHECK(offsetof(Header, norm_eps) == 52 && offsetof(Header, rope_scaling) == 60, "Header");
    CHECK(offsetof(Header, file_size) == 80 && offsetof(Header, vocab_hash) == 88, "Header");
    CHECK(offsetof(TokenizerHeader, bos_id) == 24 && offsetof(TokenizerHeader, n_stops) == 32, "TokenizerHeader");
    CHECK(offsetof(TokenizerHeader, stop_ids) == 36 && offsetof(TokenizerHeader, file_size) == 64, "TokenizerHeader");
    CHECK(offsetof(TokenizerHeader, n_merges) == 80 && offsetof(TokenizerHeader, rest_hash) == 104, "TokenizerHeader");
    CHECK(hash_of((Text){(const unsigned char *)"foobar", 6}) == 0x85944171f73967e8, "FNV-1a's published value");
}

int main(int argc, char **argv) {
    ask_for_tiles();
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"f16_all_values", test_f16_all_values},
        {"f16_rounding", test_f16_rounding},
        {"bf16", test_bf16},
        {"exp", test_exp},
        {"dot", test_dot},
        {"multiply_has_the_bits_of_dot", test_multiply_has_the_bits_of_dot},
        {"load", test_load},
        {"room_for_a_batch", test_room_for_a_batch},
        {"weigh", test_weigh},
        {"matmul", test_matmul},
        {"matmul_has_the_same_bits_in_any_batch", test_matmul_has_the_same_bits_in_any_batch},
        {"rmsnorm", test_rmsnorm},
        {"swiglu", test_swiglu},
        {"soften", test_soften},
        {"rope_frequency", test_rope_frequency},
        {"random_numbers", test_random_numbers},
        {"heap", test_heap},
        {"greedy", test_greedy},
        {"distribution", test_distribution},
        {"log_probability", test_log_probability},
#ifdef __linux__
        {"paging", test_paging},
#endif
        {"utf8", test_utf8},
        {"layout", test_layout},
    };
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++)
        if (argc == 1)
            puts(tests[i].name);
        else if (!strcmp(argv[1], tests[i].name)) {
            tests[i].run();
            return 0;
        }
    return argc > 1;
}
