/* LRN for a CPU, forward and backward, each one pass over memory: see kernels.py. Beta 0.75; float32, or bfloat16 with
   every sum and root in float32. The size of the window is fixed by the compiler.

   The tensor is (rows, channels, pixels): pixels == 1 is channels_last, where a row is one pixel of one column;
   otherwise a row is one column of one picture. Rows are shared out among OpenMP threads.

   Functions that take `bf16` are compiled once for each of its values, wherever they are called with a constant. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 256 /* pixels worked on together where they lie side by side */
#ifndef AROUND   /* kernels.py names it */
#define AROUND 2 /* channels on either side of the one that is normalised */
#endif
enum { WINDOW = 2 * AROUND + 1 };
#define TWICE static inline __attribute__((always_inline))

/* --------------------------------------------------------------------------- numbers */

/* bfloat16 is the upper half of a float32 */
static inline float widened(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* rounded to the nearest, to the even one of two; what is not a number stays none */
static inline uint16_t narrowed(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return value == value ? rounded : bits >> 16 | 0x40;
}

TWICE float get(const void *x, long i, int bf16)
{
    return bf16 ? widened(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

TWICE void put(void *x, long i, float value, int bf16)
{
    if (bf16)
        ((uint16_t *)x)[i] = narrowed(value);
    else
        ((float *)x)[i] = value;
}

/* d ** -0.75 is root * sqrt(root), 1 / d is root * root */
static inline float inverse_root(float d) { return 1.0f / sqrtf(d); }

static inline float window_sum(const float *x)
{
    float total = x[0];
#pragma GCC unroll WINDOW
    for (int j = 1; j < WINDOW; j++)
        total += x[j];
    return total;
}

/* Nothing before the first channel and after the last */
static inline void clear_ends(float *x, long channels)
{
    for (int j = 0; j < AROUND; j++)
        x[j] = x[channels + AROUND + j] = 0;
}

/* --------------------------------------------------------------------------- channels side by side */

TWICE void forward_row(const void *restrict a, void *restrict b, long channels, float scale, float k, int bf16)
{
    float squares[channels + 2 * AROUND];
    clear_ends(squares, channels);
    for (long c = 0; c < channels; c++)
        squares[c + AROUND] = get(a, c, bf16) * get(a, c, bf16);
    for (long c = 0; c < channels; c++) {
        float root = inverse_root(k + scale * window_sum(squares + c));
        put(b, c, get(a, c, bf16) * root * sqrtf(root), bf16);
    }
}

TWICE void backward_row(const void *restrict a, const void *restrict g, void *restrict grad, long channels, float scale,
                        float k, int bf16)
{
    float squares[channels + 2 * AROUND], through[channels + 2 * AROUND], direct[channels];
    clear_ends(squares, channels);
    clear_ends(through, channels);
    for (long c = 0; c < channels; c++)
        squares[c + AROUND] = get(a, c, bf16) * get(a, c, bf16);
    for (long c = 0; c < channels; c++) {
        float root = inverse_root(k + scale * window_sum(squares + c));
        direct[c] = get(g, c, bf16) * root * sqrtf(root);
        through[c + AROUND] = direct[c] * get(a, c, bf16) * root * root;
    }
    for (long c = 0; c < channels; c++)
        put(grad, c, direct[c] - 1.5f * scale * get(a, c, bf16) * window_sum(through + c), bf16);
}

/* --------------------------------------------------------------------------- pixels side by side */

static inline long first(long c) { return c < AROUND ? 0 : c - AROUND; }
static inline long last(long c, long channels) { return c + AROUND < channels ? c + AROUND : channels - 1; }

/* roots[p] = d ** -0.5 of channel c, for n pixels from the one at `at` */
TWICE void tile_roots(const void *restrict a, float *restrict roots, long c, long channels, long pixels, long at,
                      long n, float scale, float k, int bf16)
{
    for (long p = 0; p < n; p++)
        roots[p] = 0;
    for (long j = first(c); j <= last(c, channels); j++)
        for (long p = 0; p < n; p++)
            roots[p] += get(a, at + j * pixels + p, bf16) * get(a, at + j * pixels + p, bf16);
    for (long p = 0; p < n; p++)
        roots[p] = inverse_root(k + scale * roots[p]);
}

TWICE void forward_tile(const void *restrict a, void *restrict b, long channels, long pixels, long at, long n,
                        float scale, float k, int bf16)
{
    float roots[TILE];
    for (long c = 0; c < channels; c++) {
        tile_roots(a, roots, c, channels, pixels, at, n, scale, k, bf16);
        for (long p = 0; p < n; p++)
            put(b, at + c * pixels + p, get(a, at + c * pixels + p, bf16) * roots[p] * sqrtf(roots[p]), bf16);
    }
}

/* A channel is finished when `through` is known of the AROUND channels after it: WINDOW rows are kept, in a ring. */
TWICE void backward_tile(const void *restrict a, const void *restrict g, void *restrict grad, long channels,
                         long pixels, long at, long n, float scale, float k, int bf16)
{
    float roots[TILE], sums[TILE], through[WINDOW][TILE], direct[WINDOW][TILE];
    for (long c = 0; c < channels + AROUND; c++) {
        float *new = through[c % WINDOW], *straight = direct[c % WINDOW];
        if (c < channels) {
            tile_roots(a, roots, c, channels, pixels, at, n, scale, k, bf16);
            for (long p = 0; p < n; p++) {
                straight[p] = get(g, at + c * pixels + p, bf16) * roots[p] * sqrtf(roots[p]);
                new[p] = straight[p] * get(a, at + c * pixels + p, bf16) * roots[p] * roots[p];
            }
        }
        long done = c - AROUND;
        if (done < 0 || done >= channels)
            continue;
        for (long p = 0; p < n; p++)
            sums[p] = 0;
        for (long j = first(done); j <= last(done, channels); j++)
            for (long p = 0; p < n; p++)
                sums[p] += through[j % WINDOW][p];
        for (long p = 0; p < n; p++) {
            long i = at + done * pixels + p;
            put(grad, i, direct[done % WINDOW][p] - 1.5f * scale * get(a, i, bf16) * sums[p], bf16);
        }
    }
}

/* --------------------------------------------------------------------------- what kernels.py calls */

static inline long smaller(long a, long b) { return a < b ? a : b; }

/* Row `work / tiles`, and where pixels lie side by side its tile `work % tiles`. */
TWICE void forward_piece(const void *a, void *b, long work, long tiles, long channels, long pixels, float scale,
                         float k, int bf16)
{
    long p = work % tiles * TILE, at = work / tiles * channels * pixels + p, bytes = bf16 ? 2 : 4;
    if (pixels == 1)
        forward_row((const char *)a + at * bytes, (char *)b + at * bytes, channels, scale, k, bf16);
    else
        forward_tile(a, b, channels, pixels, at, smaller(TILE, pixels - p), scale, k, bf16);
}

TWICE void backward_piece(const void *a, const void *g, void *grad, long work, long tiles, long channels, long pixels,
                          float scale, float k, int bf16)
{
    long p = work % tiles * TILE, at = work / tiles * channels * pixels + p, bytes = bf16 ? 2 : 4;
    if (pixels == 1)
        backward_row((const char *)a + at * bytes, (const char *)g + at * bytes, (char *)grad + at * bytes, channels,
                     scale, k, bf16);
    else
        backward_tile(a, g, grad, channels, pixels, at, smaller(TILE, pixels - p), scale, k, bf16);
}

void lrn_forward(const void *a, void *b, long rows, long channels, long pixels, float scale, float k, int threads,
                 int bf16)
{
    long tiles = (pixels + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long work = 0; work < rows * tiles; work++)
        if (bf16)
            forward_piece(a, b, work, tiles, channels, pixels, scale, k, 1);
        else
            forward_piece(a, b, work, tiles, channels, pixels, scale, k, 0);
}

void lrn_backward(const void *a, const void *g, void *grad, long rows, long channels, long pixels, float scale, float k,
                  int threads, int bf16)
{
    long tiles = (pixels + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long work = 0; work < rows * tiles; work++)
        if (bf16)
            backward_piece(a, g, grad, work, tiles, channels, pixels, scale, k, 1);
        else
            backward_piece(a, g, grad, work, tiles, channels, pixels, scale, k, 0);
}
