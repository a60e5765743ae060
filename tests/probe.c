/* What run.c computes, for the tests that compare it with a reference:
 *
 *     probe isa
 *     probe tokens TOKENIZER
 *     probe MODEL THREADS CHUNK LAYERS OUT TOKEN...
 *
 * prints the instruction set; or a line of ids for each text on standard input, which comes as u32 length and bytes; or
 * feeds the tokens in batches of CHUNK through the first LAYERS layers (0: all of them) and writes to OUT, as f32:
 *   x         (T, D)       after the last of these layers
 *   qkv       (T, Q + 2K)  of the last layer, queries and keys rotated
 *   attended  (T, Q)       of the last layer, as the product with wo takes it: in bf16, if isa says so and weights are
 *   hidden    (T, F)       of the last layer, as the product with w_down takes it
 *   logits    (T, V)       from x
 */
#define NO_MAIN
#include "../run.c"

static size_t number(const char *name, const char *text, long long min, long long max) {
    uint64_t value;
    set_option(&(Option){name, INTEGER, &value, min, max, "", NULL}, text);
    return value;
}

static _Noreturn void print_tokens(const char *path) {
    Tokenizer *t = open_tokenizer(path);
    for (uint32_t length; fread(&length, sizeof length, 1, stdin) == 1;) {
        unsigned char *bytes = allocate(length, 1, "a text");
        expect(fread(bytes, 1, length, stdin) == length, "standard input: expected %u bytes", length);
        Tokens tokens = {0};
        encode(t, &tokens, (Span){bytes, length});
        print_ids(tokens, " ");
        puts("");
        flush_output();
        free(tokens.data);
        free(bytes);
    }
    exit(0); // no return: the tokenizer is in use to the end, and so is no leak
}

// A matrix as f32.
static void copy_matrix(float *out, Tensor a) {
    for (size_t r = 0; r < a.rows; r++)
        for (size_t c = 0; c < a.cols; c++)
            out[r * a.cols + c] = element(a, r, c);
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "tokens"))
        print_tokens(argv[2]);
    if (argc == 2 && !strcmp(argv[1], "isa")) {
        puts(isa());
        return 0;
    }
    if (argc < 7)
        die(EXIT_USAGE, "probe: expected MODEL THREADS CHUNK LAYERS OUT TOKEN...");
    Model m = open_model(argv[1]);
    size_t threads = number("THREADS", argv[2], 1, 64);
    size_t chunk = number("CHUNK", argv[3], 1, MAX_BATCH);
    size_t n_layers = number("LAYERS", argv[4], 0, m.h.n_layers);
    if (n_layers)
        m.h.n_layers = (uint32_t)n_layers;
    size_t T = (size_t)argc - 6, D = m.h.dim, Q = m.q_dim, width = Q + 2 * m.kv_dim, F = m.h.hidden_dim;
    size_t V = m.h.vocab_size;
    uint32_t *tokens = allocate(T, sizeof *tokens, "tokens");
    for (size_t t = 0; t < T; t++)
        tokens[t] = (uint32_t)number("TOKEN", argv[6 + t], 0, (long long)V - 1);
    RunState s = alloc_run_state(&m, T, T, threads);
    chunk = min(chunk, s.batch);
    float *x = allocate(T * D, sizeof *x, "x"), *qkv = allocate(T * width, sizeof *qkv, "qkv");
    float *attended = allocate(T * Q, sizeof *attended, "attended");
    float *hidden = allocate(T * F, sizeof *hidden, "hidden");
    float *logits = s.logits;
    for (size_t pos = 0; pos < T; pos += chunk) {
        size_t n = min(chunk, T - pos);
        forward_parallel(&m, &s, tokens + pos, n, pos, 0);
        memcpy(x + pos * D, s.x, n * D * sizeof *x);
        RunState apart = s; // once more, with arrays that share no memory: they must not get into each other's way
        apart.qkv = qkv + pos * width;
        forward_parallel(&m, &apart, tokens + pos, n, pos, 0);
        expect(!memcmp(x + pos * D, s.x, n * D * sizeof *x), "arrays that share their memory overlap in time");
        Tensor heads = xb_view(&s, n, Q), gated = xb_view(&s, n, F); // the inputs of both products once more
        attention(&m, &apart, heads, m.h.n_layers - 1, pos);
        copy_matrix(attended + pos * Q, heads);
        swiglu(&apart, gated, apart.gate_up);
        copy_matrix(hidden + pos * F, gated);
        for (size_t t = 0; t < n; t++, s.logits += V)
            compute_logits(&m, &s, t, 1);
    }
    FILE *out = fopen(argv[5], "wb");
    if (!out)
        die(EXIT_ERROR, "%s: cannot write", argv[5]);
    fwrite(x, sizeof *x, T * D, out);
    fwrite(qkv, sizeof *x, T * width, out);
    fwrite(attended, sizeof *x, T * Q, out);
    fwrite(hidden, sizeof *x, T * F, out);
    fwrite(logits, sizeof *x, T * V, out);
    return fclose(out) ? EXIT_ERROR : 0;
}
