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

static float uniform(void) { return (float)(2 * random_f64(&seed) - 1); }

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
        sum += (double)load_number(a, a_type, i) * (double)load_number(b, b_type, i);
    return sum;
}

// The pairs of types that gemm takes, the last one where the CPU has an instruction for it.
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
        CHECK(float_bits(value) == h << 16, "%04x", h);
        CHECK(isnan(value) ? (f32_to_bf16(value) & 0x7fff) > 0x7f80 : f32_to_bf16(value) == h, "%04x and back", h);
        if ((h & 0x7f80) != 0x7f80) {
            CHECK(f32_to_bf16(float_from_bits(h << 16 | 0x8000)) == h + h % 2, "the middle above %04x", h);
            CHECK(f32_to_bf16(float_from_bits(h << 16 | 0x7fff)) == h, "below the middle above %04x", h);
            CHECK(f32_to_bf16(float_from_bits(h << 16 | 0x8001)) == h + 1, "above the middle above %04x", h);
        }
    }
    CHECK(isnan(bf16_to_f32(f32_to_bf16(float_from_bits(0x7f800001)))), "a NaN whose fraction has low bits only");
}

static void test_exp(void) {
    for (double x = 88; x > -87; x -= 0.00037) {
        double expected = exp((double)(float)x), found = (double)exp_f32((float)x);
        double ulp = (double)nextafterf((float)expected, INFINITY) - (double)(float)expected;
        CHECK(fabs(found - expected) <= 3 * ulp, "e^%g is %.9g, not %.9g", x, expected, found);
    }
    CHECK(exp_f32(0) == 1 && exp_f32(-INFINITY) == 0 && exp_f32(-88) == 0, "the ends");
    CHECK(exp_f32(89) == exp_f32(88) && exp_f32(INFINITY) == exp_f32(88), "above 88");
    CHECK(isnan(exp_f32(NAN)), "NaN");
}

// ---- kernels against their plain forms

static Tensor random_matrix(Dtype dtype, size_t rows, size_t cols, size_t stride, size_t shift) {
    return (Tensor){random_array(dtype, rows * stride, shift), dtype, rows, cols, stride};
}

// gemm, which in the program has no weights in f32
static void multiply(float *out, size_t stride, Tensor w, Tensor x, Update update) {
    if (w.dtype == F32)
        gemm_typed(out, stride, w, F32, x, F32, update);
    else
        gemm(out, stride, w, x, update);
}

// start + the product of row r of w and row t of x
static float dot(float start, Tensor w, size_t r, Tensor x, size_t t) {
    multiply(&start, 1, slice(w, r, 1, 0, w.cols), slice(x, t, 1, 0, x.cols), ADD);
    return start;
}

static void test_dot(void) {
    for (size_t n = 0; n < 300; n++)
        for (size_t p = 0; p < n_pairs(); p++)
            for (size_t shift = 0; shift < 3; shift++) {
                Tensor a = random_matrix(PAIRS[p][0], 1, n, n, shift),
                       b = random_matrix(PAIRS[p][1], 1, n, n, 2 * shift);
                double expected = exact_dot(a.data, a.dtype, b.data, b.dtype, n), found = (double)dot(0, a, 0, b, 0);
                double plain = (double)dot_ref(a, 0, b, 0), bound = 1e-6 * (double)(n + 1);
                CHECK(fabs(found - expected) <= bound, "types %zu, n %zu: %g, not %g", p, n, found, expected);
                CHECK(fabs(plain - expected) <= bound, "dot_ref, types %zu, n %zu", p, n);
            }
}

// Groups of tokens and pairs of rows give the same bits as dot: this is why neither a batch's size nor the threads matter.
static void test_gemm_has_the_bits_of_dot(void) {
    enum { MOST = SMALL_BATCH + 1 }; // the first number that is a large batch, see gemm_typed
    for (size_t n = 1; n < 3100; n += n < 140 ? 1 : 977)
        for (size_t p = 0; p < n_pairs(); p++)
            for (size_t tokens = 1; tokens <= MOST; tokens += tokens <= TOKENS_IN_L1 ? 1 : MOST - TOKENS_IN_L1 - 1) {
                enum { STRIDE = 2 * MR };
                size_t rows = 1 + n % (STRIDE - 1);
                Tensor w = random_matrix(PAIRS[p][0], rows, n, n + 1, 0);
                Tensor x = random_matrix(PAIRS[p][1], tokens, n, n + 2, n % 3);
                float out[MOST + 1][STRIDE];
                for (size_t i = 0; i < sizeof out / sizeof out[0][0]; i++)
                    out[i / STRIDE][i % STRIDE] = 0.75f;
                bool add = n % 2;
                multiply(out[0], STRIDE, w, x, add ? ADD : SET);
                for (size_t t = 0; t < MOST + 1; t++)
                    for (size_t r = 0; r < STRIDE; r++) {
                        float expected = 0.75f;
                        if (t < tokens && r < rows)
                            expected = dot(add ? 0.75f : 0, w, r, x, t);
                        CHECK(float_bits(out[t][r]) == float_bits(expected), "n %zu, row %zu, token %zu: %g, not %g", n,
                              r, t, (double)out[t][r], (double)expected);
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

static void test_weighted_sum(void) {
    for (size_t n = 1; n < 150; n += n < 70 ? 1 : 13)
        for (size_t m = 0; m < 70; m += 1 + m / 3)
            for (size_t P = 1; P <= (has_bf16_dot() ? 2 : 1); P++) { // numbers of a pair
                const Dtype a_type = P == 2 ? BF16 : F32, x_type = P == 2 ? BF16 : F16;
                float y[Q_TILE][152], alone[152];
                const size_t stride = m + 1; // of a
                float *a = random_array(a_type, P * Q_TILE * stride, 0);
                const uint16_t *x = random_array(x_type, P * (m * n + 16), 1); // the most that it reads beyond
                for (size_t q = 0; q < Q_TILE; q++)
                    for (size_t c = 0; c < 152; c++)
                        y[q][c] = (float)c;
                weighted_sum(y[0], 152, a, stride, Q_TILE, x, P == 2, m, n);
                for (size_t q = 0; q < Q_TILE; q++) {
                    float plain[152];
                    for (size_t c = 0; c < 152; c++)
                        plain[c] = alone[c] = (float)c;
                    for (size_t j = 0; j < m * P; j++)
                        for (size_t c = 0; c < n; c++)
                            plain[c] += load_number(a + q * stride, a_type, j) *
                                        load_number(x, x_type, (j / P * n + c) * P + j % P);
                    weighted_sum(alone, 152, a + q * stride, stride, 1, x, P == 2, m, n);
                    for (size_t c = 0; c < 152; c++) {
                        CHECK(fabsf(y[q][c] - plain[c]) <= 3e-5f * (float)(P * m + 1), "m %zu, n %zu, column %zu", m, n,
                              c);
                        CHECK(float_bits(y[q][c]) == float_bits(alone[c]), "the bits of a query alone: m %zu, n %zu", m,
                              n);
                    }
                }
            }
}

// What matmul needs for T tokens and such weights.
static RunState workspace(Dtype dtype, size_t T, size_t cols) {
    RunState s = {.threads = 1, .xb_type = choose_xb_type(dtype), .scratch_size = cols};
    size_t room = round_up(T, 64) * xb_stride(s.xb_type, cols);
    s.xb = allocate(room, sizeof(float), "a test");
    memset(s.xb, 0xff, room * sizeof(float)); // NaN, which nobody shall use
    s.scratch = allocate(s.scratch_size, sizeof *s.scratch, "a test");
    return s;
}

// The input of a product: x (T, cols), rounded to what the product reads.
static Tensor input_of(const RunState *s, const float *x, size_t T, size_t cols) {
    Tensor view = xb_view(s, T, cols);
    for (size_t t = 0; t < T; t++)
        store_row(view, t, 0, x + t * cols, cols);
    return view;
}

// out (T, rows) = x . w^T, or += it, for x (T, cols)
static void product(RunState *s, float *out, Tensor w, const float *x, size_t T, bool add) {
    Tensor input = input_of(s, x, T, w.cols);
    if (add)
        matmul_add(s, out, w, input);
    else
        matmul(s, out, w, input);
}

static void test_matmul(void) {
    for (size_t p = 1; p < 3; p++) // weights in bf16, f16
        for (size_t cols = 1; cols < 700; cols += 1 + cols / 2)
            for (size_t rows = 1; rows < 150; rows += 1 + rows / 2)
                for (size_t T = 1; T < 30; T += T < 8 ? 1 : 5) {
                    Dtype dtype = PAIRS[p][0];
                    Tensor w = random_matrix(dtype, rows, cols, cols, 0);
                    float *x = random_array(F32, T * cols, 0), *out = random_array(F32, T * rows + 1, 0);
                    float *before = allocate(T * rows + 1, sizeof *out, "a test");
                    memcpy(before, out, (T * rows + 1) * sizeof *out);
                    RunState s = workspace(dtype, T, cols);
                    bool add = T % 2;
                    product(&s, out, w, x, T, add);
                    for (size_t t = 0; t < T; t++)
                        for (size_t r = 0; r < rows; r++) {
                            const void *row = element_ptr(w.data, dtype, r * cols);
                            double expected = exact_dot(row, dtype, x + t * cols, F32, cols);
                            expected += add ? (double)before[t * rows + r] : 0;
                            double rounding = dtype == BF16 && has_bf16_dot() ? 0.004 : 1e-6;
                            CHECK(fabs((double)out[t * rows + r] - expected) <= rounding * (double)(cols + 1),
                                  "%zu x %zu, token %zu of %zu, row %zu", rows, cols, t, T, r);
                        }
                    CHECK(out[T * rows] == before[T * rows], "wrote behind the end");
                    free(s.xb);
                    free(s.scratch);
                    free(before);
                }
}

// matmul and matmul_add against the plain loops that they stand for, on the same input, so that only the order of the
// sums differs: in groups of rows and tokens and parts of them, and in rows that are longer than a chunk.
static void test_matmul_agrees_with_matmul_ref(void) {
    const size_t shapes[][2] = {{1, 1}, {3, 7}, {4, 64}, {5, 65}, {37, 96}, {131, 176}, {70, 520}, {33, 4133}};
    const size_t batches[] = {1, 2, 3, 7, SMALL_BATCH, SMALL_BATCH + 1, 65};
    for (Dtype dtype = BF16; dtype <= F16; dtype++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            for (size_t j = 0; j < sizeof batches / sizeof *batches; j++) {
                const size_t rows = shapes[i][0], cols = shapes[i][1], T = batches[j], n = T * rows;
                Tensor w = random_matrix(dtype, rows, cols, cols, 0);
                RunState s = workspace(dtype, T, cols);
                Tensor x = input_of(&s, random_array(F32, T * cols, 0), T, cols);
                float *out = random_array(F32, n, 0), *plain = random_array(F32, n, 0);
                for (Update update = SET; update <= ADD; update++) {
                    if (update == SET)
                        matmul(&s, out, w, x);
                    else
                        matmul_add(&s, out, w, x); // to the sums of the first time
                    matmul_ref(plain, w, x, update);
                    for (size_t k = 0; k < n; k++)
                        CHECK(fabsf(out[k] - plain[k]) <= 1e-6f * (float)(cols + 1),
                              "type %d, update %d, %zu x %zu, token %zu of %zu, row %zu: %g, not %g", dtype, update,
                              rows, cols, k / rows, T, k % rows, (double)out[k], (double)plain[k]);
                }
                free(s.xb);
                free(s.scratch);
            }
}

// Rows longer than a chunk, too, and products below the least normal number: one token's are the same bits in every batch.
static void test_matmul_has_the_same_bits_in_any_batch(void) {
    const size_t batches[] = {2, TOKENS_IN_L1 - 1, TOKENS_IN_L1, TOKENS_IN_L1 + 1, 20, 33, 70};
    for (size_t p = 1; p < 3; p++) // weights in bf16, f16
        for (size_t cols = 1000; cols < 5500; cols += 743)
            for (size_t i = 0; i < sizeof batches / sizeof *batches; i++) {
                enum { ROWS = 70 };
                size_t T = batches[i];
                Tensor w = random_matrix(PAIRS[p][0], ROWS, cols, cols, 0);
                float *x = random_array(F32, T * cols, 0), *out = random_array(F32, T * ROWS, 0), one[ROWS];
                for (size_t j = 0; j < T * cols && i % 4 == 2; j++)
                    x[j] *= 0x1p-124f;
                RunState s = workspace(PAIRS[p][0], T, cols);
                bool add = T % 2;
                float *before = allocate(T * ROWS, sizeof *out, "a test");
                memcpy(before, out, T * ROWS * sizeof *out);
                product(&s, out, w, x, T, add);
                for (size_t t = 0; t < T; t++) {
                    memcpy(one, before + t * ROWS, sizeof one);
                    product(&s, one, w, x + t * cols, 1, add);
                    CHECK(!memcmp(one, out + t * ROWS, sizeof one), "%zu columns, token %zu of %zu", cols, t, T);
                }
                free(s.xb);
                free(s.scratch);
                free(before);
            }
}

static void free_run_state(const Model *m, RunState *s, size_t context) {
    munmap(s->k, (size_t)kv_cache_bytes(m, context) + 64);
    void *const memory[] = {s->x, s->qkv, s->xb, s->logits, s->rope_cos, s->rope_sin, s->scratch};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        free(memory[i]);
}

// A model of one layer without weights.
static Model small_model(Dtype dtype, size_t H, size_t G, size_t d) {
    Model m = {.file.path = "a test", .q_dim = H * d, .kv_dim = G * d};
    m.h = (Header){.dtype = (uint32_t)dtype, .dim = 8, .hidden_dim = 8, .n_layers = 1, .vocab_size = 8};
    m.h.n_heads = (uint32_t)H;
    m.h.n_kv_heads = (uint32_t)G;
    m.h.head_dim = (uint32_t)d;
    return m;
}

// T tokens from position pos on, in a KV cache that holds random keys and values at all positions, later ones included.
static void check_attention(const Model *m, RunState *s, size_t pos, size_t T) {
    size_t Q = m->q_dim, width = Q + 2 * m->kv_dim, d = m->h.head_dim;
    for (size_t i = 0; i < T * width; i++)
        s->qkv[i] = bf16_to_f32(f32_to_bf16(4 * uniform())); // a kernel may take it in bf16: then that changes nothing
    Tensor out = xb_view(s, T, Q);
    float *plain = allocate(T * Q, sizeof *plain, "a test");
    memset(out.data, 0xff, T * out.stride * size_of(out.dtype)); // NaN: all is to be written
    attention_ref(m, s, out, 0, pos);
    for (size_t i = 0; i < T * Q; i++)
        plain[i] = element(out, i / Q, i % Q);
    memset(out.data, 0xff, T * out.stride * size_of(out.dtype));
    attention(m, s, out, 0, pos);
    // Values are below 1. Where both are multiplied in bf16, weights are rounded to it, and so is the result.
    float bound = (s->kv_type == BF16 ? 0.0025f : 2e-6f) + (out.dtype == F32 ? 0 : 0.004f);
    for (size_t i = 0; i < T * Q; i++) {
        float found = element(out, i / Q, i % Q);
        CHECK(fabsf(found - plain[i]) <= bound,
              "type %u, %u of %u heads of %zu, position %zu, token %zu of %zu, element %zu: %g, not %g", m->h.dtype,
              m->h.n_heads, m->h.n_kv_heads, d, pos, i / Q, T, i % Q, (double)found, (double)plain[i]);
    }
    free(plain);
}

static void test_attention_agrees_with_attention_ref(void) {
    enum { CONTEXT = 4 * KV_BLOCK };
    const size_t head_dims[] = {2, 6, 24, 32, 50, 64, 128}, heads[][2] = {{1, 1}, {3, 3}, {4, 2}, {6, 1}};
    const size_t positions[] = {0, 1, KV_BLOCK - 2, KV_BLOCK - 1, KV_BLOCK, 2 * KV_BLOCK - 1, 3 * KV_BLOCK - 7};
    const size_t batches[] = {1, 2, 5, Q_BLOCK + 3};
    for (Dtype dtype = BF16; dtype <= F16; dtype++)
        for (size_t i = 0; i < sizeof head_dims / sizeof *head_dims; i++)
            for (size_t j = 0; j < sizeof heads / sizeof *heads; j++) {
                size_t d = head_dims[i], G = heads[j][1];
                Model m = small_model(dtype, heads[j][0], G, d);
                RunState s = alloc_run_state(&m, CONTEXT, 1, 1);
                for (size_t pos = 0; pos < CONTEXT; pos++)
                    for (size_t g = 0; g < G; g++) {
                        float *k = random_array(F32, 2 * d, 0);
                        cache_kv(&m, &s, 0, g, pos, k, k + d);
                        free(k);
                    }
                for (size_t p = 0; p < sizeof positions / sizeof *positions; p++)
                    for (size_t b = 0; b < sizeof batches / sizeof *batches; b++)
                        check_attention(&m, &s, positions[p], batches[b]);
                free_run_state(&m, &s, CONTEXT);
            }
}

// Each element of the KV cache has a place of its own.
static void test_kv_cache_places(void) {
    enum { CONTEXT = 2 * KV_BLOCK };
    for (Dtype kv_type = BF16; kv_type <= F16; kv_type++) {
        Model m = small_model(BF16, 2, 2, 6);
        m.h.n_layers = 3;
        RunState s = {.context = CONTEXT, .kv_type = kv_type};
        size_t n = 3 * 2 * CONTEXT * 6;
        uint8_t *seen = allocate(n, 1, "a test");
        memset(seen, 0, n);
        for (size_t i = 0; i < n; i++) {
            size_t c = i % 6, pos = i / 6 % CONTEXT, g = i / 6 / CONTEXT % 2, layer = i / 6 / CONTEXT / 2;
            size_t k = k_index(&m, &s, layer, g, pos, c), v = v_index(&m, &s, layer, g, pos, c);
            CHECK(k < n && v < n, "type %d: outside of the cache", kv_type);
            seen[k] |= 1;
            seen[v] |= 2;
        }
        for (size_t i = 0; i < n; i++)
            CHECK(seen[i] == 3, "type %d: two elements share a place", kv_type);
        free(seen);
    }
}

// The activations of a batch and the logits together take no more than BATCH_BYTES.
static void test_room_for_a_batch(void) {
    Model m = {.file.path = "a test", .q_dim = 2048, .kv_dim = 256};
    m.h = (Header){.dtype = BF16, .dim = 2048, .hidden_dim = 5632, .n_layers = 1, .n_heads = 32, .n_kv_heads = 4};
    m.h.head_dim = 64;
    m.h.vocab_size = 150000;
    for (size_t rows = 1; rows <= SCORED_AT_ONCE; rows += SCORED_AT_ONCE - 1) {
        RunState s = alloc_run_state(&m, 512, rows, 1);
        size_t token = (2048 + 2 * 5632 + 64) * sizeof(float) + xb_stride(s.xb_type, 5632) * size_of(s.xb_type);
        size_t bytes = s.batch * token + rows * m.h.vocab_size * sizeof(float);
        bool most = s.batch == MAX_BATCH || bytes + token > BATCH_BYTES;
        CHECK(bytes <= BATCH_BYTES && most, "%zu tokens, %zu logits: %zu bytes", s.batch, rows, bytes);
        free_run_state(&m, &s, 512);
    }
}

// How long a pass of a token takes with `size` threads on `cores` cores, of which other programs occupy `busy`. A thread
// that shares its core with another program has half of it, and all threads wait for this one.
static double pass_time(size_t size, size_t cores, size_t busy) {
    return 0.01 / (double)size * (size + busy > cores ? 2.2 : 1);
}

// Passes of tokens while other programs come and go: their time next to that with the best fixed number of threads. The
// first pass after a change and the trials of other sizes are what it costs to find that number.
static void test_adapt_team(void) {
    const size_t busy[] = {0, 1, 0, 2, 1, 0};
    for (size_t cores = 2; cores <= 16; cores *= 2) {
        struct Team team = {.all = cores, .size = cores};
        for (size_t phase = 0; phase < sizeof busy / sizeof *busy; phase++) {
            double best = 1, time = 0, tokens = 0;
            for (size_t size = 1; size <= cores; size++)
                best = fmin(best, pass_time(size, cores, busy[phase]));
            while (time < 2) {
                double took = pass_time(team.size, cores, busy[phase]);
                adapt_team(&team, took);
                team.next_try -= took; // this time has not really passed
                time += took;
                tokens++;
            }
            CHECK(team.size >= 1 && team.size <= cores, "%zu of %zu threads", team.size, cores);
            double least = phase == 0 ? 0.99 : 0.85;
            CHECK(best * tokens > least * time, "%zu cores, phase %zu: %.3f of the best speed, %zu threads at last",
                  cores, phase, best * tokens / time, team.size);
        }
    }
}

static void test_rmsnorm(void) {
    enum { T = 3 };
    for (size_t n = 1; n < 100; n++) {
        float *x = random_array(F32, T * n, 1);
        Tensor weight = random_matrix(BF16, 1, n, n, 0);
        RunState s = workspace(F16, T, n);
        Tensor out = xb_view(&s, T, n);
        rmsnorm(&s, out, x, weight, 0.01f);
        for (size_t t = 0; t < T; t++) {
            const float *row = x + t * n;
            double mean = exact_dot(row, F32, row, F32, n) / (double)n;
            for (size_t i = 0; i < n; i++) {
                double expected = (double)row[i] / sqrt(mean + 0.01) * (double)element(weight, 0, i);
                CHECK(fabs((double)element(out, t, i) - expected) < 1e-5, "token %zu, element %zu of %zu", t, i, n);
            }
        }
    }
}

static void test_swiglu(void) {
    enum { F = 37, T = 2 };
    float in[T * 2 * F];
    for (size_t i = 0; i < T * 2 * F; i++)
        in[i] = 20 * uniform();
    in[0] = 200;
    in[1] = -200;
    in[2] = 0;
    RunState s = workspace(F16, T, F);
    Tensor out = xb_view(&s, T, F);
    swiglu(&s, out, in);
    for (size_t i = 0; i < T * F; i++) {
        const float *row = in + i / F * 2 * F;
        double g = (double)row[i % F], expected = g / (1 + exp(-g)) * (double)row[F + i % F];
        CHECK(fabs((double)element(out, i / F, i % F) - expected) <= 1e-6 * (1 + fabs(expected)), "silu(%g)", g);
    }
}

static void test_softmax(void) {
    for (size_t n = 1; n < 300; n += 7) {
        float *x = random_array(F32, n, 1), *p = allocate(n, sizeof *p, "a test");
        double exact = 0, largest = -1e9;
        for (size_t i = 0; i < n; i++) {
            x[i] = p[i] = 30 * x[i];
            largest = fmax(largest, (double)x[i]);
        }
        for (size_t i = 0; i < n; i++)
            exact += exp((double)x[i] - largest);
        softmax(p, n);
        for (size_t i = 0; i < n; i++)
            CHECK(fabs((double)p[i] - exp((double)x[i] - largest) / exact) < 1e-6, "%zu of %zu", i, n);
    }
}

// The online softmax over blocks is the softmax over all.
static void test_online_softmax(void) {
    for (size_t n = 1; n < 300; n += 7) {
        float largest_so_far = -INFINITY, sum = 0, p[320], raw[320];
        for (size_t start = 0; start < n; start += KV_BLOCK) {
            for (size_t j = 0; j < KV_BLOCK; j++) // what is not visible may be anything
                p[start + j] = raw[start + j] = start + j < n ? 30 * uniform() : NAN;
            float rescale = online_softmax(p + start, min(KV_BLOCK, n - start), 0.5f, &largest_so_far, &sum);
            for (size_t j = 0; j < start; j++)
                p[j] *= rescale;
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
        CHECK(n % KV_BLOCK == 0 || p[n] == 0, "an invisible key has a weight");
    }
}

// Each pair (x[i], x[i + d/2]) turns by its angle.
static void test_rope(void) {
    Model m = small_model(F16, 1, 1, 8);
    m.h.rope_theta = 10000;
    RunState s = alloc_run_state(&m, 64, 1, 1);
    rope_cos_sin(&s, &m.h, 37, 3);
    for (size_t t = 0; t < 3; t++) {
        float x[8], before[8];
        for (size_t i = 0; i < 8; i++)
            x[i] = before[i] = uniform();
        rope(x, s.rope_cos + t * 4, s.rope_sin + t * 4, 4);
        for (size_t i = 0; i < 4; i++) {
            double angle = (37 + (double)t) * pow(10000, -2 * (double)i / 8), a = (double)before[i];
            double b = (double)before[i + 4];
            CHECK(fabs((double)x[i] - (a * cos(angle) - b * sin(angle))) < 1e-5, "token %zu, pair %zu", t, i);
            CHECK(fabs((double)x[i + 4] - (b * cos(angle) + a * sin(angle))) < 1e-5, "token %zu, pair %zu", t, i);
        }
    }
    free_run_state(&m, &s, 64);
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
    s.probabilities = allocate(n, sizeof *s.probabilities, "a test");
    return s;
}

static void test_random_numbers(void) { // splitmix64's published first numbers for the seed 1234567
    uint64_t state = 1234567;
    const uint64_t expected[] = {6457827717110365317u, 3203168211198807973u, 9817491932198370423u};
    for (int i = 0; i < 3; i++)
        CHECK(random_f64(&state) == (double)(expected[i] >> 11) * 0x1p-53, "number %d", i);
}

static void test_heap(void) {
    Heap heap = {0};
    for (uint32_t i = 0; i < 1000; i++)
        heap_push(&heap, (HeapEntry){.key = (float)(int)(20 * uniform()), .index = i});
    HeapEntry last = heap_pop(&heap);
    while (heap.n) {
        HeapEntry following = heap_pop(&heap);
        CHECK(heap_before(last, following), "%g %u before %g %u", (double)last.key, last.index, (double)following.key,
              following.index);
        last = following;
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
        double mean = expected[i] * (double)DRAWS;
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

static void test_log_sum_exp(void) {
    const float logits[] = {1000, 999, -1000}, small[] = {-2000, -1000};
    CHECK(fabs(log_sum_exp(logits, 3) - 1000 - log(1 + exp(-1))) < 1e-9, "e^1000 overflows");
    CHECK(fabs(log_sum_exp(small, 2) + 1000) < 1e-9, "e^-1000 underflows");
}

// ---- a model larger than memory

#ifdef __linux__
enum { N_PIECES = 6 };

// Has the system forget pieces of the file.
static void forget(const Paging *p, size_t first, size_t last) {
    uint8_t all[N_PIECES] = {2, 2, 2, 2, 2, 2};
    for (size_t i = first; i <= last; i++)
        evict(&(Paging){.m = p->m, .misses = all, .keep = SIZE_MAX}, i);
}

static double part_in_memory(const Paging *p, size_t piece) {
    unsigned char pages[PIECE_BYTES / MIN_PAGE];
    size_t n = PIECE_BYTES / (size_t)sysconf(_SC_PAGESIZE), found = 0;
    CHECK(!mincore(p->m->file.bytes + piece * PIECE_BYTES, PIECE_BYTES, pages), "%s", strerror(errno));
    for (size_t i = 0; i < n; i++)
        found += pages[i] & 1;
    return (double)found / (double)n;
}

// Reads the file as a pass does, by tensors of 3 MB and a little, from the second piece on.
static void read_pass(Paging *p) {
    volatile unsigned char read = 0;
    size_t n;
    for (size_t at = PIECE_BYTES; at < p->m->file.size; at += n) {
        n = min((3 << 20) + 64, p->m->file.size - at);
        page_weights(p, (Tensor){p->m->file.bytes + at, BF16, 1, n / 2, n / 2});
        for (size_t i = 0; i < n; i += MIN_PAGE)
            read = p->m->file.bytes[at + i];
    }
    (void)read;
}

static size_t n_missing(const Paging *p) {
    size_t n = 0;
    for (size_t i = 0; i < N_PIECES; i++)
        n += p->misses[i] > 0;
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
    Model m = {.file.fd = fd, .file.size = N_PIECES * PIECE_BYTES};
    m.file.bytes = mmap(NULL, m.file.size, PROT_READ, MAP_SHARED, fd, 0);
    uint8_t misses[N_PIECES] = {0};
    Paging p = {.m = &m, .at = m.file.size, .major_faults = LONG_MAX, .misses = misses};
    forget(&p, 0, N_PIECES - 1);
    if (part_in_memory(&p, 3) > 0)
        exit(77); // the disk is memory, say

    read_pass(&p);
    CHECK(!p.active && part_in_memory(&p, 3) == 1, "the first pass lets nothing go");
    read_pass(&p);
    CHECK(p.active && n_missing(&p) == 0 && part_in_memory(&p, 3) == 1, "the second finds all in memory");
    read_pass(&p);
    CHECK(!p.active, "pages were read in the second pass");
    forget(&p, 1, 3);
    read_pass(&p);
    CHECK(!p.active && part_in_memory(&p, 3) == 1, "something was let go before it was known that memory is short");
    for (size_t pass = 1; pass <= 2; pass++) {
        forget(&p, 1, 3);
        forget(&p, 5, 5);
        read_pass(&p);
        CHECK(p.active && n_missing(&p) == 4, "%zu pieces were missing, not 4", n_missing(&p));
        CHECK(part_in_memory(&p, 2) == (pass == 1), "a piece shall be let go when it was missing twice in a row");
    }
    page_weights(&p, (Tensor){p.m->file.bytes + PIECE_BYTES, BF16, 1, 1, 1}); // the next pass begins
    CHECK(part_in_memory(&p, 1) == 1, "the first missing piece shall stay");
    CHECK(part_in_memory(&p, 4) == 1, "what was in memory shall stay");
    for (size_t piece = 2; piece < N_PIECES; piece += piece == 3 ? 2 : 1)
        CHECK(part_in_memory(&p, piece) < 0.5, "piece %zu, which had to be read, shall be let go", piece);
}
#endif

// ---- text

static int length_of(const char *bytes, size_t n) {
    uint32_t codepoint;
    return decode_utf8((Span){(const unsigned char *)bytes, n}, &codepoint);
}

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

// ---- the file formats, as models/FORMAT.md documents them

static void test_layout(void) {
    CHECK(offsetof(Header, version) == 8 && offsetof(Header, dtype) == 12 && offsetof(Header, flags) == 16, "Header");
    CHECK(offsetof(Header, dim) == 20 && offsetof(Header, head_dim) == 40 && offsetof(Header, max_seq_len) == 48, " ");
    CHECK(offsetof(Header, norm_eps) == 52 && offsetof(Header, rope_scaling) == 60, "Header");
    CHECK(offsetof(Header, file_size) == 80 && offsetof(Header, vocab_hash) == 88, "Header");
    CHECK(offsetof(TokenizerHeader, version) == 8 && offsetof(TokenizerHeader, hash) == 16, "TokenizerHeader");
    CHECK(offsetof(TokenizerHeader, file_size) == 24 && offsetof(TokenizerHeader, vocab_hash) == 32, "TokenizerHeader");
    CHECK(offsetof(TokenizerHeader, flags) == 40 && offsetof(TokenizerHeader, bos_id) == 48, "TokenizerHeader");
    CHECK(offsetof(TokenizerHeader, n_stops) == 56 && offsetof(TokenizerHeader, stop_ids) == 60, "TokenizerHeader");
    CHECK(offsetof(TokenizerHeader, n_by_text) == 88 && offsetof(TokenizerHeader, n_states) == 104, "TokenizerHeader");
    CHECK(offsetof(TokenizerHeader, template_flags) == 108 && offsetof(TokenizerHeader, n_text) == 116, " ");
    CHECK(offsetof(TokenizerHeader, template_ends) == 120 && sizeof(TokenizerHeader) == 160, "TokenizerHeader");
    CHECK(sizeof(Piece) == 16 && offsetof(Piece, type) == 8 && offsetof(Piece, score) == 12, "Piece");
    CHECK(sizeof(Merge) == 16 && offsetof(Merge, merged) == 8 && sizeof(TemplateItem) == 12, "Merge, TemplateItem");
    const uint32_t letters[] = {'f', 'o', 'o', 'b', 'a', 'r'}; // FNV-1a's published value is of the bytes
    CHECK(hash_of(letters, sizeof letters) == 0x85944171f73967e8, "FNV-1a");
    CHECK(hash_of(&(uint32_t){0x80000001}, 4) == (0xcbf29ce484222325 ^ 0x80000001) * 0x100000001b3, "a whole word");
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"f16_all_values", test_f16_all_values},
        {"f16_rounding", test_f16_rounding},
        {"bf16", test_bf16},
        {"exp", test_exp},
        {"dot", test_dot},
        {"gemm_has_the_bits_of_dot", test_gemm_has_the_bits_of_dot},
        {"load", test_load},
        {"room_for_a_batch", test_room_for_a_batch},
        {"weighted_sum", test_weighted_sum},
        {"matmul", test_matmul},
        {"matmul_agrees_with_matmul_ref", test_matmul_agrees_with_matmul_ref},
        {"matmul_has_the_same_bits_in_any_batch", test_matmul_has_the_same_bits_in_any_batch},
        {"attention_agrees_with_attention_ref", test_attention_agrees_with_attention_ref},
        {"kv_cache_places", test_kv_cache_places},
        {"adapt_team", test_adapt_team},
        {"rmsnorm", test_rmsnorm},
        {"swiglu", test_swiglu},
        {"softmax", test_softmax},
        {"online_softmax", test_online_softmax},
        {"rope", test_rope},
        {"rope_frequency", test_rope_frequency},
        {"random_numbers", test_random_numbers},
        {"heap", test_heap},
        {"greedy", test_greedy},
        {"distribution", test_distribution},
        {"log_sum_exp", test_log_sum_exp},
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
