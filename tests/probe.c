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
    Tokenizer t = open_tokenizer(path);
    for (uint32_t length; fread(&length, sizeof length, 1, stdin) == 1;) {
        unsigned char *bytes = allocate(length, 1, "a text");
        expect(fread(bytes, 1, length, stdin) == length, "standard input: expected %u bytes", length);
        Buffer tokens = {0};
        encode(&t, &tokens, (Text){bytes, length});
        print_ids(tokens, " ");
        puts("");
        flush_output();
        free(tokens.data);
        free(bytes);
    }
    exit(0); // no return: the tokenizer is in use to the end, and so is no leak
}

// The input of a product (T, cols) as f32.
static void copy_input(const State *s, float *out, size_t T, size_t cols) {
    for (size_t t = 0; t < T; t++)
        for (size_t c = 0; c < cols; c++)
            out[t * cols + c] = element(s->input, s->input_type, t * input_stride(cols) + c);
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "tokens"))
        print_tokens(argv[2]);
    if (argc == 2 && !strcmp(argv[1], "isa")) {
        puts(isa());
        return 0;
    }
    if (argc < 7)
        die(USAGE, "probe: expected MODEL THREADS CHUNK LAYERS OUT TOKEN...");
    Model m = open_model(argv[1]);
    size_t threads = number("THREADS", argv[2], 1, 64);
    size_t chunk = number("CHUNK", argv[3], 1, MAX_BATCH);
    m.h.n_layers = (uint32_t)number("LAYERS", argv[4], 0, m.h.n_layers);
    if (m.h.n_layers == 0)
        memcpy(&m.h, m.file.bytes, sizeof m.h);
    size_t T = (size_t)argc - 6, D = m.h.dim, Q = m.q_dim, width = Q + 2 * m.kv_dim, F = m.h.hidden_dim,
           V = m.h.vocab_size;
    uint32_t *tokens = allocate(T, sizeof *tokens, "tokens");
    for (size_t t = 0; t < T; t++)
        tokens[t] = (uint32_t)number("TOKEN", argv[6 + t], 0, (long long)V - 1);
    State s = open_state(&m, T, T, threads);
    chunk = smaller(chunk, s.batch);
    float *x = allocate(T * D, sizeof *x, "x"), *qkv = allocate(T * width, sizeof *qkv, "qkv");
    float *attended = allocate(T * Q, sizeof *attended, "attended"),
          *hidden = allocate(T * F, sizeof *hidden, "hidden");
    float *logits = s.logits;
    for (size_t pos = 0; pos < T; pos += chunk) {
        size_t n = smaller(chunk, T - pos);
        feed_batch(&m, &s, tokens + pos, n, pos);
        memcpy(x + pos * D, s.x, n * D * sizeof *x);
        State apart = s; // once more, with arrays that share no memory: they must not get into each other's way
        apart.qkv = qkv + pos * width;
        feed_batch(&m, &apart, tokens + pos, n, pos);
        expect(!memcmp(x + pos * D, s.x, n * D * sizeof *x), "arrays that share their memory overlap in time");
        attention(&m, &apart, m.h.n_layers - 1, pos, n); // so the inputs of both products are there again
        copy_input(&s, attended + pos * Q, n, Q);
        swiglu(&apart, n, F);
        copy_input(&s, hidden + pos * F, n, F);
        for (size_t t = 0; t < n; t++, s.logits += V)
            classify(&m, &s, t, 1);
    }
    FILE *out = fopen(argv[5], "wb");
    if (!out)
        die(CANNOT, "%s: cannot write", argv[5]);
    fwrite(x, sizeof *x, T * D, out);
    fwrite(qkv, sizeof *x, T * width, out);
    fwrite(attended, sizeof *x, T * Q, out);
    fwrite(hidden, sizeof *x, T * F, out);
    fwrite(logits, sizeof *x, T * V, out);
    return fclose(out) ? CANNOT : 0;
}
