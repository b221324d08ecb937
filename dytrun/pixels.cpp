// Operations on 8-bit RGB images, bit for bit those of Pillow 13 (src/libImaging) on x86-64.
//
// `pixels.py` compiles this file once a machine, calls it through ctypes and gives the memory. An image is rows of
// 3 × width bytes; `stride` is the distance of its rows in bytes, 3 × width where it is not given. Functions that need
// memory of their own return 0, or 1 where there is none.
//
// Compiled with -ffp-contract=off: a fused multiply-add rounds once where Pillow's wheels for x86-64 round twice. (Those
// for ARM may fuse, and then differ from this by one level here and there.)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

using Byte = uint8_t;
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));

// Memory that a thread keeps from call to call.
template <int, typename Item>
Item* scratch(int64_t size) {
    thread_local std::vector<Item> kept;
    if (int64_t(kept.size()) < size) kept.resize(size);
    return kept.data();
}

inline Byte clipped(int32_t value) { return Byte(value < 0 ? 0 : value > 255 ? 255 : value); }

// ---------------------------------------------------------------------------------------------------------- resizing

constexpr int FRACTION = 22;  // bits after the point of a coefficient
constexpr int32_t HALF = 1 << (FRACTION - 1);

// Keys' cubic convolution with a = -1/2 in Pillow's order of operations; a triangle.
inline double cubic(double x) {
    x = std::fabs(x);
    const double near = (1.5 * x - 2.5) * x * x + 1;
    const double far = (((x - 5) * x + 8) * x - 4) * -0.5;
    return x < 1.0 ? near : x < 2.0 ? far : 0.0;
}

inline double triangle(double x) {
    x = std::fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

// How output positions from `first` on are made of input positions: `taps` coefficients each, zero beyond `count`.
struct Axis {
    int taps;
    int32_t* start;
    int32_t* count;
    int32_t* coefficients;
};

template <int SLOT>
Axis axis_of(int in_size, int out_size, int first, int number, bool is_cubic) {
    const double scale = double(float(in_size)) / out_size;
    const double stretch = scale < 1.0 ? 1.0 : scale;
    const double support = (is_cubic ? 2.0 : 1.0) * stretch;
    const double inverse = 1.0 / stretch;
    Axis axis;
    axis.taps = int(std::ceil(support)) * 2 + 1;
    axis.start = scratch<SLOT, int32_t>(2 * int64_t(number) + int64_t(number) * axis.taps);
    axis.count = axis.start + number;
    axis.coefficients = axis.count + number;
    double* weights = scratch<SLOT, double>(axis.taps);
    for (int i = 0; i < number; i++) {
        const double center = (first + i + 0.5) * scale;
        const int start = std::max(0, int(center - support + 0.5));
        const int count = std::min(in_size, int(center + support + 0.5)) - start;
        int32_t* coefficients = axis.coefficients + int64_t(i) * axis.taps;
        if (is_cubic) {
            for (int j = 0; j < count; j++) weights[j] = cubic((j + start - center + 0.5) * inverse);
        } else {
            for (int j = 0; j < count; j++) weights[j] = triangle((j + start - center + 0.5) * inverse);
        }
        double sum = 0.0;
        for (int j = 0; j < count; j++) sum += weights[j];
        for (int j = 0; j < count; j++) {
            const double weight = (sum != 0.0 ? weights[j] / sum : weights[j]) * (1 << FRACTION);
            coefficients[j] = int32_t(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        std::fill(coefficients + count, coefficients + axis.taps, 0);
        axis.start[i] = start;
        axis.count[i] = count;
    }
    return axis;
}

inline Int4 loaded(const Byte* from) {
    uint32_t bits;
    std::memcpy(&bits, from, 4);
    const Int4 shifted = {int32_t(bits & 255), int32_t(bits >> 8 & 255), int32_t(bits >> 16 & 255), 0};
    return shifted;
}

template <int ROWS>
void across_rows(const Byte* in, int64_t stride, Byte* out, int64_t out_stride, const Axis& axis, int number) {
    for (int i = 0; i < number; i++) {
        const int32_t* coefficients = axis.coefficients + int64_t(i) * axis.taps;
        const Byte* from = in + 3 * int64_t(axis.start[i]);
        int32_t sums[ROWS][3];
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 3; c++) sums[r][c] = HALF;
        for (int j = 0; j < axis.count[i]; j++, from += 3)
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < 3; c++) sums[r][c] += coefficients[j] * from[r * stride + c];
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 3; c++) out[r * out_stride + 3 * i + c] = clipped(sums[r][c] >> FRACTION);
    }
}

void across(const Byte* in, int64_t stride, int rows, Byte* out, const Axis& axis, int number) {
    const int64_t out_stride = 3 * int64_t(number);
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        across_rows<4>(in + row * stride, stride, out + row * out_stride, out_stride, axis, number);
    for (; row < rows; row++)
        across_rows<1>(in + row * stride, stride, out + row * out_stride, out_stride, axis, number);
}

void down(const Byte* in, int64_t stride, Byte* out, const Axis& axis, int number, int64_t width) {
    constexpr int BLOCK = 64;
    for (int i = 0; i < number; i++, out += width) {
        const int32_t* coefficients = axis.coefficients + int64_t(i) * axis.taps;
        const Byte* from = in + axis.start[i] * stride;
        for (int64_t x = 0; x < width; x += BLOCK) {
            int32_t sums[BLOCK];
            const int length = int(std::min<int64_t>(BLOCK, width - x));
            if (length == BLOCK) {
                for (int b = 0; b < BLOCK; b++) sums[b] = HALF;
                for (int j = 0; j < axis.count[i]; j++)
                    for (int b = 0; b < BLOCK; b++) sums[b] += coefficients[j] * from[j * stride + x + b];
                for (int b = 0; b < BLOCK; b++) out[x + b] = clipped(sums[b] >> FRACTION);
            } else {
                for (int b = 0; b < length; b++) {
                    int32_t sum = HALF;
                    for (int j = 0; j < axis.count[i]; j++) sum += coefficients[j] * from[j * stride + x + b];
                    out[x + b] = clipped(sum >> FRACTION);
                }
            }
        }
    }
}

void resize(const Byte* in, int64_t stride, int height, int width, Byte* out, int out_height, int out_width, int top,
            int left, int rows, int columns, bool is_cubic) {
    const int64_t out_stride = 3 * int64_t(columns);
    const bool is_high = out_height != height, is_wide = out_width != width;
    int first = top, last = top + rows;  // of the input's rows
    Axis vertical;
    if (is_high) {
        vertical = axis_of<0>(height, out_height, top, rows, is_cubic);
        first = height, last = 0;
        for (int i = 0; i < rows; i++) {
            first = std::min(first, vertical.start[i]);
            last = std::max(last, vertical.start[i] + vertical.count[i]);
        }
        for (int i = 0; i < rows; i++) vertical.start[i] -= first;
    }
    in += first * stride;
    if (is_wide) {
        const Axis horizontal = axis_of<1>(width, out_width, left, columns, is_cubic);
        Byte* between = is_high ? scratch<0, Byte>((last - first) * out_stride) : out;
        across(in, stride, last - first, between, horizontal, columns);
        in = between;
        stride = out_stride;
    } else {
        in += 3 * int64_t(left);
    }
    if (is_high) {
        down(in, stride, out, vertical, rows, out_stride);
    } else if (!is_wide) {
        for (int row = 0; row < rows; row++) std::memcpy(out + row * out_stride, in + row * stride, out_stride);
    }
}

// ----------------------------------------------------------------------------------------------------------- warping

constexpr int EDGE = 2;  // by so much the taps of a pixel may lie outside the image, where its border is repeated

// The image in double as R, G, B, 0, with its border repeated.
const double* widened(const Byte* in, int height, int width) {
    const int64_t across = width + 2 * EDGE;
    double* out = scratch<0, double>(4 * across * (height + 2 * EDGE) + 4);
    for (int y = 0; y < height; y++) {
        double* row = out + 4 * across * (y + EDGE);
        for (int x = 0; x < width; x++) {
            const Byte* from = in + 3 * (int64_t(y) * width + x);
            double* to = row + 4 * (x + EDGE);
            to[0] = from[0], to[1] = from[1], to[2] = from[2], to[3] = 0;
        }
        for (int x = 0; x < EDGE; x++) {
            std::memcpy(row + 4 * x, row + 4 * EDGE, 4 * sizeof(double));
            std::memcpy(row + 4 * (width + EDGE + x), row + 4 * (width + EDGE - 1), 4 * sizeof(double));
        }
    }
    for (int y = 0; y < EDGE; y++) {
        std::memcpy(out + 4 * across * y, out + 4 * across * EDGE, 4 * across * sizeof(double));
        std::memcpy(out + 4 * across * (height + EDGE + y), out + 4 * across * (height + EDGE - 1),
                    4 * across * sizeof(double));
    }
    return out;
}

inline Double4 at(const double* from) {
    Double4 value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

// Between b and c, at d from b. Sums of whole numbers are exact in any order, so this serves a row of pixels alone.
inline Double4 cubic_of_pixels(const double* from, double d) {
    const Double4 v1 = at(from), v2 = at(from + 4), v3 = at(from + 8), v4 = at(from + 12);
    const Double4 a = v1 - v2, s = a + (v3 - v4);
    return v2 + d * ((v3 - v1) + d * ((a + s) - d * s));
}

// The same with the roundings of Pillow's -v1 + v3, 2 * (v1 - v2) + v3 - v4 and -v1 + v2 - v3 + v4.
inline Double4 cubic_of_rows(Double4 v1, Double4 v2, Double4 v3, Double4 v4, double d) {
    const Double4 a = v1 - v2;
    return v2 + d * ((v3 - v1) + d * (((a + a) + v3 - v4) + d * (v4 - (a + v3))));
}

inline Double4 bicubic(const double* corner, int64_t stride, double dx, double dy) {
    return cubic_of_rows(cubic_of_pixels(corner, dx), cubic_of_pixels(corner + stride, dx),
                         cubic_of_pixels(corner + 2 * stride, dx), cubic_of_pixels(corner + 3 * stride, dx), dy);
}

inline Double4 bilinear(const double* corner, int64_t stride, double dx, double dy) {
    const Double4 a = at(corner) + (at(corner + 4) - at(corner)) * dx;
    const Double4 b = at(corner + stride) + (at(corner + stride + 4) - at(corner + stride)) * dx;
    return a + (b - a) * dy;
}

template <bool IS_CUBIC>
void warp(const Byte* in, int height, int width, Byte* out, const double* m, const Byte* fill) {
    const double* wide = widened(in, height, width);
    const int64_t stride = 4 * int64_t(width + 2 * EDGE);
    for (int y = 0; y < height; y++) {
        for (int x = 0; x < width; x++, out += 3) {
            const double xin = m[0] * (x + 0.5) + m[1] * (y + 0.5) + m[2];
            const double yin = m[3] * (x + 0.5) + m[4] * (y + 0.5) + m[5];
            if (!(xin >= 0.0 && xin < width && yin >= 0.0 && yin < height)) {
                std::memcpy(out, fill, 3);
                continue;
            }
            const double left = std::floor(xin - 0.5), top = std::floor(yin - 0.5);
            const double dx = xin - 0.5 - left, dy = yin - 0.5 - top;
            const int column = int(left), row = int(top);
            const double* corner = wide + stride * (row + EDGE - IS_CUBIC) + 4 * (column + EDGE - IS_CUBIC);
            const Double4 found = (IS_CUBIC ? bicubic : bilinear)(corner, stride, dx, dy);
            for (int c = 0; c < 3; c++) out[c] = Byte(int32_t(std::min(255.0, std::max(0.0, found[c]))));
        }
    }
}

// ------------------------------------------------------------------------------------------------------ single pixels

inline Byte blended(int32_t from, int32_t to, float factor) {
    const float value = float(from) + factor * float(to - from);
    return Byte(int32_t(std::min(255.0f, std::max(0.0f, value))));
}

inline int32_t gray(const Byte* pixel) {
    return (pixel[0] * 19595 + pixel[1] * 38470 + pixel[2] * 7471 + 0x8000) >> 16;
}

}  // namespace

extern "C" {

int pixels_resized(const Byte* in, int64_t stride, int height, int width, Byte* out, int out_height, int out_width,
                   int top, int left, int rows, int columns, int is_cubic) try {
    resize(in, stride, height, width, out, out_height, out_width, top, left, rows, columns, is_cubic);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

int pixels_warped(const Byte* in, int height, int width, Byte* out, double a, double b, double c, double d, double e,
                  double f, int red, int green, int blue, int is_cubic) try {
    const double matrix[] = {a, b, c, d, e, f};
    const Byte fill[] = {Byte(red), Byte(green), Byte(blue)};
    (is_cubic ? warp<true> : warp<false>)(in, height, width, out, matrix, fill);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

void pixels_mapped(const Byte* in, int64_t number, Byte* out, const Byte* table) {
    for (int64_t i = 0; i < number; i++) {
        out[3 * i] = table[in[3 * i]];
        out[3 * i + 1] = table[256 + in[3 * i + 1]];
        out[3 * i + 2] = table[512 + in[3 * i + 2]];
    }
}

// `counts` are 3 × 256.
void pixels_histogram(const Byte* in, int64_t number, int64_t* counts) {
    // Several tables: to count the same value twice in a row would wait for memory.
    constexpr int TABLES = 4;
    int64_t parts[TABLES][3][256] = {};
    int64_t i = 0;
    for (; i + TABLES <= number; i += TABLES)
        for (int t = 0; t < TABLES; t++)
            for (int c = 0; c < 3; c++) parts[t][c][in[3 * (i + t) + c]]++;
    for (; i < number; i++)
        for (int c = 0; c < 3; c++) parts[0][c][in[3 * i + c]]++;
    for (int v = 0; v < 3 * 256; v++) {
        counts[v] = 0;
        for (int t = 0; t < TABLES; t++) counts[v] += parts[t][v / 256][v % 256];
    }
}

int64_t pixels_gray_sum(const Byte* in, int64_t number) {
    int64_t sum = 0;
    for (int64_t i = 0; i < number; i++) sum += gray(in + 3 * i);
    return sum;
}

void pixels_color(const Byte* in, int64_t number, Byte* out, float factor) {
    for (int64_t i = 0; i < number; i++) {
        const int32_t from = gray(in + 3 * i);
        for (int c = 0; c < 3; c++) out[3 * i + c] = blended(from, in[3 * i + c], factor);
    }
}

// Smoothed: the mean of 3 × 3 with the centre taken five times, rounded; the border stays. 13 does not divide 2 sum + 13
// in halves, so there are no ties, and whole numbers give what Pillow's floats do.
void pixels_sharpened(const Byte* in, int height, int width, Byte* out, float factor) {
    const int64_t stride = 3 * int64_t(width);
    if (height < 3 || width < 3) {
        std::memcpy(out, in, stride * height);
        return;
    }
    std::memcpy(out, in, stride);
    for (int y = 1; y < height - 1; y++) {
        const Byte* __restrict__ row = in + y * stride;
        Byte* __restrict__ to = out + y * stride;
        std::memcpy(to, row, 3);
        for (int64_t x = 3; x < stride - 3; x++) {
            const Byte* p = row + x;
            const uint16_t sum = p[-stride - 3] + p[-stride] + p[-stride + 3] + p[-3] + 5 * p[0] + p[3] +
                                 p[stride - 3] + p[stride] + p[stride + 3];
            to[x] = blended(uint16_t(2 * sum + 13) / 26, p[0], factor);
        }
        std::memcpy(to + stride - 3, row + stride - 3, 3);
    }
    std::memcpy(out + (height - 1) * stride, in + (height - 1) * stride, stride);
}

void pixels_flipped(const Byte* in, int height, int width, Byte* out) {
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++)
            std::memcpy(out + 3 * (int64_t(y) * width + x), in + 3 * (int64_t(y + 1) * width - 1 - x), 3);
}

// Into planes, `channel` values apart, or with the channels of a pixel side by side, 1 apart.
void pixels_normalised(const Byte* in, int64_t images, int64_t number, float* out, int64_t channel,
                       const float* table) {
    for (int64_t n = 0; n < images; n++, in += 3 * number, out += 3 * number) {
        if (channel == 1) {
            for (int64_t i = 0; i < number; i++)
                for (int c = 0; c < 3; c++) out[3 * i + c] = table[256 * c + in[3 * i + c]];
        } else {
            for (int64_t i = 0; i < number; i++)
                for (int c = 0; c < 3; c++) out[c * channel + i] = table[256 * c + in[3 * i + c]];
        }
    }
}

}  // extern "C"
