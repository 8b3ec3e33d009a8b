/* LRN for a CPU, forward and backward, each one pass over memory: see kernels.py. float32, five channels, beta 0.75.

   The tensor is (rows, channels, pixels): pixels == 1 is channels_last, where a row is one pixel of one column;
   otherwise a row is one column of one picture. Rows are shared out among OpenMP threads. */

#include <math.h>

#define TILE 256 /* pixels worked on together where they lie side by side */
#define AROUND 2 /* channels on either side of the one that is normalised */

/* d ** -0.75 is root * sqrt(root), 1 / d is root * root */
static inline float inverse_root(float d) { return 1.0f / sqrtf(d); }

/* --------------------------------------------------------------------------- channels side by side */

static void forward_row(const float *restrict a, float *restrict b, long channels, float scale, float k)
{
    float squares[channels + 2 * AROUND];
    squares[0] = squares[1] = squares[channels + 2] = squares[channels + 3] = 0;
    for (long c = 0; c < channels; c++)
        squares[c + AROUND] = a[c] * a[c];
    for (long c = 0; c < channels; c++) {
        const float *s = squares + c;
        float root = inverse_root(k + scale * (s[0] + s[1] + s[2] + s[3] + s[4]));
        b[c] = a[c] * root * sqrtf(root);
    }
}

static void backward_row(const float *restrict a, const float *restrict g, float *restrict grad, long channels,
                         float scale, float k)
{
    float squares[channels + 2 * AROUND], through[channels + 2 * AROUND];
    squares[0] = squares[1] = squares[channels + 2] = squares[channels + 3] = 0;
    through[0] = through[1] = through[channels + 2] = through[channels + 3] = 0;
    for (long c = 0; c < channels; c++)
        squares[c + AROUND] = a[c] * a[c];
    for (long c = 0; c < channels; c++) {
        const float *s = squares + c;
        float root = inverse_root(k + scale * (s[0] + s[1] + s[2] + s[3] + s[4]));
        float direct = g[c] * root * sqrtf(root);
        grad[c] = direct;
        through[c + AROUND] = direct * a[c] * root * root;
    }
    for (long c = 0; c < channels; c++) {
        const float *t = through + c;
        grad[c] -= 1.5f * scale * a[c] * (t[0] + t[1] + t[2] + t[3] + t[4]);
    }
}

/* --------------------------------------------------------------------------- pixels side by side */

static inline long first(long c) { return c < AROUND ? 0 : c - AROUND; }
static inline long last(long c, long channels) { return c + AROUND < channels ? c + AROUND : channels - 1; }

/* roots[p] = d ** -0.5 of channel c, for n pixels */
static inline void tile_roots(const float *restrict a, float *restrict roots, long c, long channels, long pixels, long n,
                              float scale, float k)
{
    for (long p = 0; p < n; p++)
        roots[p] = 0;
    for (long j = first(c); j <= last(c, channels); j++)
        for (long p = 0; p < n; p++)
            roots[p] += a[j * pixels + p] * a[j * pixels + p];
    for (long p = 0; p < n; p++)
        roots[p] = inverse_root(k + scale * roots[p]);
}

static void forward_tile(const float *restrict a, float *restrict b, long channels, long pixels, long n, float scale,
                         float k)
{
    float roots[TILE];
    for (long c = 0; c < channels; c++) {
        tile_roots(a, roots, c, channels, pixels, n, scale, k);
        for (long p = 0; p < n; p++)
            b[c * pixels + p] = a[c * pixels + p] * roots[p] * sqrtf(roots[p]);
    }
}

/* A channel is finished when `through` is known of the two channels after it: five rows are kept, in a ring. */
static void backward_tile(const float *restrict a, const float *restrict g, float *restrict grad, long channels,
                          long pixels, long n, float scale, float k)
{
    float roots[TILE], sums[TILE], through[2 * AROUND + 1][TILE];
    for (long c = 0; c < channels + AROUND; c++) {
        float *new = through[c % (2 * AROUND + 1)];
        if (c < channels) {
            tile_roots(a, roots, c, channels, pixels, n, scale, k);
            for (long p = 0; p < n; p++) {
                float direct = g[c * pixels + p] * roots[p] * sqrtf(roots[p]);
                grad[c * pixels + p] = direct;
                new[p] = direct * a[c * pixels + p] * roots[p] * roots[p];
            }
        }
        long done = c - AROUND;
        if (done < 0 || done >= channels)
            continue;
        for (long p = 0; p < n; p++)
            sums[p] = 0;
        for (long j = first(done); j <= last(done, channels); j++)
            for (long p = 0; p < n; p++)
                sums[p] += through[j % (2 * AROUND + 1)][p];
        for (long p = 0; p < n; p++)
            grad[done * pixels + p] -= 1.5f * scale * a[done * pixels + p] * sums[p];
    }
}

/* --------------------------------------------------------------------------- what kernels.py calls */

static inline long smaller(long a, long b) { return a < b ? a : b; }

void lrn_forward(const float *a, float *b, long rows, long channels, long pixels, float scale, float k, int threads)
{
    long tiles = (pixels + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long work = 0; work < rows * tiles; work++) {
        long p = work % tiles * TILE, at = work / tiles * channels * pixels + p;
        if (pixels == 1)
            forward_row(a + at, b + at, channels, scale, k);
        else
            forward_tile(a + at, b + at, channels, pixels, smaller(TILE, pixels - p), scale, k);
    }
}

void lrn_backward(const float *a, const float *g, float *grad, long rows, long channels, long pixels, float scale,
                  float k, int threads)
{
    long tiles = (pixels + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long work = 0; work < rows * tiles; work++) {
        long p = work % tiles * TILE, at = work / tiles * channels * pixels + p;
        if (pixels == 1)
            backward_row(a + at, g + at, grad + at, channels, scale, k);
        else
            backward_tile(a + at, g + at, grad + at, channels, pixels, smaller(TILE, pixels - p), scale, k);
    }
}
