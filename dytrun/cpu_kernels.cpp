// DyT on a CPU in one pass over memory each way: y = weight * tanh(alpha * x + shift) + bias, in float32.
//
// `cpu_kernels.py` compiles this file once a machine, calls it through ctypes and gives the memory. Activations are a
// dense matrix of `rows` × `cols`. `in_columns`: a column is a channel (tokens; NHWC); else a row is one, number
// `row % channels` (NCHW). alpha, shift, weight and bias are float32 and one value a channel.
//
// The backward pass recomputes tanh from x. What it sums, it sums in float32 over at most BLOCK terms, and over blocks in
// double, in an order that depends on the shape and on the number of threads alone.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <omp.h>

namespace {

constexpr int64_t BLOCK = 64;
constexpr int SUMS = 4;  // of the gradients of alpha, shift, weight and bias

struct bfloat16 {
    uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void store(float value, float& out) { out = value; }

// To the nearest, ties to even; a NaN stays one.
inline void store(float value, bfloat16& out) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// tanh(z) and 1 - tanh(z)², from one exponential. The slope in this form keeps its digits where tanh has rounded to 1;
// tanh near 0, where 1 - e would lose them, comes from a polynomial. Largest error 2 units of the last place.
inline void tanh_and_slope(float z, float& value, float& slope) {
    const float size = std::fabs(z);
    // exp(-2 |z|) = 2^n exp(r) with |r| <= log(2) / 2. Beyond 20 the slope, 2e-17, counts as 0: gradients that are made
    // of it would soon be subnormal numbers, on which processors, and the matrix products that get them, are ten times
    // as slow. A NaN passes.
    const float power = -2.0f * (size > 20.0f ? 20.0f : size);
    const float n = std::nearbyint(power * 1.44269504f);
    const float r = (power - n * 0.693359375f) + n * 2.12194440e-4f;
    const float q = (((1.393364367e-3f * r + 8.363175565e-3f) * r + 4.166646497e-2f) * r + 1.666657700e-1f) * r + 0.5f;
    const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    const float e = size > 20.0f ? 0.0f : scale * (1.0f + (r + r * r * q));
    const float inverse = 1.0f / (1.0f + e);
    const float u = z * z;
    const float odd = (((-6.531511127e-3f * u + 2.126712586e-2f) * u - 5.390250313e-2f) * u + 1.333307860e-1f) * u -
                      3.333333174e-1f;
    const float far = std::copysign((1.0f - e) * inverse, z);
    value = size < 0.5625f ? z + z * (u * odd) : far;
    slope = 4.0f * e * inverse * inverse;
}

struct Channels {
    const float *alpha, *shift, *weight, *bias;
};

struct Layout {
    int64_t rows, cols, channels;
    int in_columns;
};

template <class X, class Y>
void forward(const X* x, Y* y, Channels of, Layout in, int threads) {
    const int64_t cols = in.cols;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < in.rows; row++) {
        const X* from = x + row * cols;
        Y* to = y + row * cols;
        if (in.in_columns) {
#pragma omp simd
            for (int64_t c = 0; c < cols; c++) {
                float value, slope;
                tanh_and_slope(of.alpha[c] * load(from[c]) + of.shift[c], value, slope);
                store(of.weight[c] * value + of.bias[c], to[c]);
            }
        } else {
            const int64_t c = row % in.channels;
            const float alpha = of.alpha[c], shift = of.shift[c], weight = of.weight[c], bias = of.bias[c];
#pragma omp simd
            for (int64_t i = 0; i < cols; i++) {
                float value, slope;
                tanh_and_slope(alpha * load(from[i]) + shift, value, slope);
                store(weight * value + bias, to[i]);
            }
        }
    }
}

// One row whose columns are channels: dx, and what it adds to each channel's sums.
template <class X, class Y>
inline void backward_row(const X* x, const Y* dy, X* dx, Channels of, int64_t cols, float* sums) {
    float *da = sums, *ds = sums + cols, *dw = sums + 2 * cols, *db = sums + 3 * cols;
#pragma omp simd
    for (int64_t c = 0; c < cols; c++) {
        const float in = load(x[c]), grad = load(dy[c]);
        float value, slope;
        tanh_and_slope(of.alpha[c] * in + of.shift[c], value, slope);
        const float h = grad * of.weight[c] * slope;
        store(of.alpha[c] * h, dx[c]);
        da[c] += in * h;
        ds[c] += h;
        dw[c] += grad * value;
        db[c] += grad;
    }
}

// A part of a row that is one channel.
template <class X, class Y>
inline void backward_part(const X* x, const Y* dy, X* dx, Channels of, int64_t c, int64_t size, double* sums) {
    const float alpha = of.alpha[c], shift = of.shift[c], weight = of.weight[c];
    float da = 0, ds = 0, dw = 0, db = 0;
#pragma omp simd reduction(+ : da, ds, dw, db)
    for (int64_t i = 0; i < size; i++) {
        const float in = load(x[i]), grad = load(dy[i]);
        float value, slope;
        tanh_and_slope(alpha * in + shift, value, slope);
        const float h = grad * weight * slope;
        store(alpha * h, dx[i]);
        da += in * h;
        ds += h;
        dw += grad * value;
        db += grad;
    }
    sums[0] += da;
    sums[1] += ds;
    sums[2] += dw;
    sums[3] += db;
}

// `sums`: SUMS × channels, out.
template <class X, class Y>
void backward(const X* x, const Y* dy, X* dx, Channels of, double* sums, Layout in, int threads) {
    const int64_t rows = in.rows, cols = in.cols, width = SUMS * in.channels;
    std::memset(sums, 0, sizeof(double) * width);
    if (in.in_columns) {
        const std::unique_ptr<double[]> partial(new double[threads * width]());
#pragma omp parallel num_threads(threads)
        {
            const std::unique_ptr<float[]> block(new float[width]);
            double* mine = partial.get() + omp_get_thread_num() * width;
#pragma omp for schedule(static)
            for (int64_t first = 0; first < (rows + BLOCK - 1) / BLOCK; first++) {
                const int64_t end = (first + 1) * BLOCK < rows ? (first + 1) * BLOCK : rows;
                std::memset(block.get(), 0, sizeof(float) * width);
                for (int64_t row = first * BLOCK; row < end; row++)
                    backward_row(x + row * cols, dy + row * cols, dx + row * cols, of, cols, block.get());
                for (int64_t i = 0; i < width; i++) mine[i] += block[i];
            }
        }
        for (int thread = 0; thread < threads; thread++)
            for (int64_t i = 0; i < width; i++) sums[i] += partial[thread * width + i];
        return;
    }
    const std::unique_ptr<double[]> partial(new double[rows * SUMS]());
    constexpr int64_t PART = BLOCK * 16;  // a lane of a vector sums up BLOCK of them
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < cols; i += PART) {
            const int64_t at = row * cols + i;
            backward_part(x + at, dy + at, dx + at, of, row % in.channels, cols - i < PART ? cols - i : PART,
                          partial.get() + row * SUMS);
        }
    for (int64_t row = 0; row < rows; row++)
        for (int k = 0; k < SUMS; k++) sums[k * in.channels + row % in.channels] += partial[row * SUMS + k];
}

}  // namespace

#define KERNELS(NAME, X, Y)                                                                                           \
    extern "C" void forward_##NAME(const X* x, Y* y, const float* alpha, const float* shift, const float* weight,     \
                                   const float* bias, Layout in, int threads) {                                       \
        forward(x, y, {alpha, shift, weight, bias}, in, threads);                                                     \
    }                                                                                                                 \
    extern "C" void backward_##NAME(const X* x, const Y* dy, X* dx, const float* alpha, const float* shift,           \
                                    const float* weight, double* sums, Layout in, int threads) {                      \
        backward(x, dy, dx, {alpha, shift, weight, nullptr}, sums, in, threads);                                      \
    }

// The dtype of the activations, and that of what comes out.
KERNELS(float32_float32, float, float)
KERNELS(float32_bfloat16, float, bfloat16)
KERNELS(bfloat16_bfloat16, bfloat16, bfloat16)
KERNELS(bfloat16_float32, bfloat16, float)
