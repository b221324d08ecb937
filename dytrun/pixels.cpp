// Operations on 8-bit RGB images, bit for bit those of Pillow 13 (src/libImaging) on x86-64.
//
// `pixels.py` compiles this file once a machine, calls it through ctypes and gives the memory. An image is rows of
// 3 × width bytes; `stride` is the distance of its rows in bytes, 3 × width where it is not given. Functions that need
// memory of their own return 0, or 1 where there is none. Of four bytes in a word the first is the lowest.
//
// Compiled with -ffp-contract=off: a fused multiply-add rounds once where Pillow's wheels for x86-64 round twice. (Those
// for ARM may fuse, and then differ from this by one level here and there.)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using Byte = uint8_t;
constexpr int LINE = 64;  // bytes of a cache line, and of the largest vector

// Memory that a thread keeps from call to call, one piece for each SLOT and type.
template <int SLOT, typename Item>
Item* scratch(int64_t size) {
    thread_local std::vector<Item> kept;
    constexpr int64_t spare = LINE / sizeof(Item);
    if (int64_t(kept.size()) < size + spare) {
        kept.clear();  // so that nothing is copied
        kept.resize(size + spare);
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(kept.data());
    return kept.data() + (LINE - address % LINE) % LINE / sizeof(Item);
}

typedef int32_t Int4 __attribute__((vector_size(16)));

// The four bytes of a word.
inline Int4 split(uint32_t bytes) { return ((Int4{} + int32_t(bytes)) >> Int4{0, 8, 16, 24}) & 255; }

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

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

// One instruction adds up 4 products of a byte and a signed byte in each of 16 places. A coefficient c is three of the
// latter: c = (high × 256 + middle) × 256 + low. It is below 1.2 × 2²², so that `high` is one.
struct Digits {
    int groups;       // of 4 input positions, from the one that `start` lies in
    int32_t* first;   // group
    int32_t* values;  // low, middle, high of each group
};

Digits digits_of(const Axis& axis, int number) {
    Digits digits;
    digits.groups = (axis.taps + 6) / 4;
    const int64_t length = 12 * int64_t(digits.groups);  // bytes an output position
    digits.values = scratch<2, int32_t>(number + number * length / 4);
    digits.first = digits.values + number * length / 4;
    std::memset(digits.values, 0, number * length);
    for (int i = 0; i < number; i++) {
        const int32_t* coefficients = axis.coefficients + int64_t(i) * axis.taps;
        int8_t* to = reinterpret_cast<int8_t*>(digits.values) + i * length;
        digits.first[i] = axis.start[i] / 4;
        for (int j = 0; j < axis.count[i]; j++) {
            const int place = axis.start[i] % 4 + j;
            int8_t* group = to + place / 4 * 12 + place % 4;
            const int32_t low = int8_t(coefficients[j]), rest = (coefficients[j] - low) >> 8, middle = int8_t(rest);
            group[0] = int8_t(low), group[4] = int8_t(middle), group[8] = int8_t((rest - middle) >> 8);
        }
    }
    return digits;
}

// N sums over groups of bytes, rounded, not yet clipped. Vectors of a sum lie `step` apart, those of a group `apart`.
template <int N>
inline void summed(const __m512i* bytes, int64_t step, int64_t apart, const int32_t* digits, int groups,
                   __m512i (&sums)[N]) {
    __m512i low[N], middle[N], high[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        low[n] = _mm512_set1_epi32(HALF);
        middle[n] = high[n] = _mm512_setzero_si512();
    }
    for (int g = 0; g < groups; g++, bytes += step, digits += 3) {
        const __m512i by_low = _mm512_set1_epi32(digits[0]), by_middle = _mm512_set1_epi32(digits[1]);
        const __m512i by_high = _mm512_set1_epi32(digits[2]);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            low[n] = _mm512_dpbusd_epi32(low[n], bytes[n * apart], by_low);
            middle[n] = _mm512_dpbusd_epi32(middle[n], bytes[n * apart], by_middle);
            high[n] = _mm512_dpbusd_epi32(high[n], bytes[n * apart], by_high);
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        const __m512i upper = _mm512_add_epi32(middle[n], _mm512_slli_epi32(high[n], 8));
        sums[n] = _mm512_srai_epi32(_mm512_add_epi32(low[n], _mm512_slli_epi32(upper, 8)), FRACTION);
    }
}

// Clip to bytes: 16 bytes of the result are 4 places of each of the four, from the same quarter.
inline __m512i packed(const __m512i (&sums)[4]) {
    return _mm512_packus_epi16(_mm512_packs_epi32(sums[0], sums[1]), _mm512_packs_epi32(sums[2], sums[3]));
}

inline uint64_t first_bytes(int64_t number) { return number >= 64 ? ~uint64_t(0) : (uint64_t(1) << number) - 1; }

// Four rows as vectors of 4 rows × (4 R, 4 G, 4 B, 4 zeros).
void grouped(const Byte* in, int64_t stride, int width, __m512i* out) {
    const __m128i by_channel = _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1);
    for (int x = 0; x < width; x += 4) {
        const __mmask16 mask = __mmask16(first_bytes(std::min(12, 3 * (width - x))));
        __m512i rows = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(mask, in + 3 * x));
        rows = _mm512_inserti32x4(rows, _mm_maskz_loadu_epi8(mask, in + stride + 3 * x), 1);
        rows = _mm512_inserti32x4(rows, _mm_maskz_loadu_epi8(mask, in + 2 * stride + 3 * x), 2);
        rows = _mm512_inserti32x4(rows, _mm_maskz_loadu_epi8(mask, in + 3 * stride + 3 * x), 3);
        *out++ = _mm512_shuffle_epi8(rows, _mm512_broadcast_i32x4(by_channel));
    }
}

// `TILES` times four rows, which are `apart` vectors apart in `in` and follow each other in `out`.
template <int TILES>
void across_grouped(const __m512i* in, int64_t apart, const Digits& digits, Byte* out, int64_t stride, int number) {
    const __m512i without_gaps =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    for (int i = 0; i < number; i += 4) {
        __m512i sums[TILES][4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            const int at = std::min(i + k, number - 1);
            const int32_t* values = digits.values + int64_t(at) * 3 * digits.groups;
            __m512i found[TILES];
            summed(in + digits.first[at], 1, apart, values, digits.groups, found);
#pragma GCC unroll 4
            for (int t = 0; t < TILES; t++) sums[t][k] = found[t];
        }
        const __mmask16 mask = __mmask16(first_bytes(std::min(12, 3 * (number - i))));
        Byte* to = out + 3 * i;
#pragma GCC unroll 4
        for (int t = 0; t < TILES; t++, to += 4 * stride) {
            const __m512i rows = _mm512_shuffle_epi8(packed(sums[t]), without_gaps);
            _mm_mask_storeu_epi8(to, mask, _mm512_castsi512_si128(rows));
            _mm_mask_storeu_epi8(to + stride, mask, _mm512_extracti32x4_epi32(rows, 1));
            _mm_mask_storeu_epi8(to + 2 * stride, mask, _mm512_extracti32x4_epi32(rows, 2));
            _mm_mask_storeu_epi8(to + 3 * stride, mask, _mm512_extracti32x4_epi32(rows, 3));
        }
    }
}

void across(const Byte* in, int64_t stride, int rows, int width, Byte* out, const Axis& axis, int number) {
    const Digits digits = digits_of(axis, number);
    const int64_t length = 3 * int64_t(number), apart = (width + 3) / 4 + digits.groups;
    __m512i* tiles = reinterpret_cast<__m512i*>(scratch<2, Byte>(2 * LINE * apart));
    int row = 0;
    for (; row + 8 <= rows; row += 8) {
        grouped(in + row * stride, stride, width, tiles);
        grouped(in + (row + 4) * stride, stride, width, tiles + apart);
        across_grouped<2>(tiles, apart, digits, out + row * length, length, number);
    }
    for (; row < rows; row++) {  // as four that are the same
        grouped(in + row * stride, 0, width, tiles);
        across_grouped<1>(tiles, 0, digits, out + row * length, 0, number);
    }
}

// Four rows as 4 vectors for each 64 columns: 4 bytes of each column. Vector k has columns 4 k to 4 k + 3 of each 16.
void stacked(const Byte* const* rows, int64_t width, __m512i* out) {
    for (int64_t x = 0; x < width; x += 64, out += 4) {
        const uint64_t mask = first_bytes(width - x);
        const __m512i a = _mm512_maskz_loadu_epi8(mask, rows[0] + x), b = _mm512_maskz_loadu_epi8(mask, rows[1] + x);
        const __m512i c = _mm512_maskz_loadu_epi8(mask, rows[2] + x), d = _mm512_maskz_loadu_epi8(mask, rows[3] + x);
        const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
        const __m512i ab_high = _mm512_unpackhi_epi8(a, b), cd_high = _mm512_unpackhi_epi8(c, d);
        out[0] = _mm512_unpacklo_epi16(ab, cd), out[1] = _mm512_unpackhi_epi16(ab, cd);
        out[2] = _mm512_unpacklo_epi16(ab_high, cd_high), out[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
    }
}

void down(const Byte* in, int64_t stride, int rows, Byte* out, const Axis& axis, int number, int64_t width) {
    const Digits digits = digits_of(axis, number);
    const int64_t blocks = (width + 63) / 64;
    __m512i* stack = reinterpret_cast<__m512i*>(
        scratch<2, Byte>(4 * LINE * blocks * ((rows + 3) / 4 + int64_t(digits.groups))));
    for (int row = 0; row < rows; row += 4) {
        const Byte* four[4];
        for (int r = 0; r < 4; r++) four[r] = in + std::min(row + r, rows - 1) * stride;
        stacked(four, width, stack + row * blocks);
    }
    for (int i = 0; i < number; i++, out += width) {
        const int32_t* values = digits.values + int64_t(i) * 3 * digits.groups;
        for (int64_t block = 0; block < blocks; block++) {
            const __m512i* from = stack + 4 * (digits.first[i] * blocks + block);
            __m512i sums[4];
            summed(from, 4 * blocks, 1, values, digits.groups, sums);
            _mm512_mask_storeu_epi8(out + 64 * block, first_bytes(width - 64 * block), packed(sums));
        }
    }
}

#else

typedef int32_t Two __attribute__((vector_size(32)));  // R, G, B and something of two rows

void across(const Byte* in, int64_t stride, int rows, int width, Byte* out, const Axis& axis, int number) {
    const int64_t length = 3 * int64_t(number);
    int32_t* tile = scratch<2, int32_t>(16 * int64_t(width));
    for (int row = 0; row < rows; row += 4) {
        for (int r = 0; r < 4; r++) {
            const Byte* from = in + std::min(row + r, rows - 1) * stride;
            for (int x = 0; x < width; x++) {
                uint32_t bytes = 0;
                if (x < width - 1) {
                    std::memcpy(&bytes, from + 3 * x, 4);
                } else {
                    std::memcpy(&bytes, from + 3 * x, 3);  // behind the last one there may be nothing
                }
                const Int4 values = split(bytes);
                std::memcpy(tile + 16 * x + 4 * r, &values, sizeof(values));
            }
        }
        for (int i = 0; i < number; i++) {
            const int32_t* coefficients = axis.coefficients + int64_t(i) * axis.taps;
            const Two* from = reinterpret_cast<const Two*>(tile) + 2 * axis.start[i];
            Two upper = Two{} + HALF, lower = upper;
            for (int j = 0; j < axis.count[i]; j++) {
                upper += from[2 * j] * coefficients[j];
                lower += from[2 * j + 1] * coefficients[j];
            }
            int32_t values[16];
            for (Two* sum : {&upper, &lower}) {
                *sum >>= FRACTION;
                *sum = *sum < 0 ? Two{} : *sum;
                *sum = *sum > 255 ? Two{} + 255 : *sum;
            }
            std::memcpy(values, &upper, sizeof(upper));
            std::memcpy(values + 8, &lower, sizeof(lower));
            Byte* to = out + row * length + 3 * i;
            for (int r = 0; r < std::min(4, rows - row); r++, to += length)
                to[0] = Byte(values[4 * r]), to[1] = Byte(values[4 * r + 1]), to[2] = Byte(values[4 * r + 2]);
        }
    }
}

void down(const Byte* in, int64_t stride, int, Byte* out, const Axis& axis, int number, int64_t width) {
    constexpr int64_t BLOCK = 64;
    for (int i = 0; i < number; i++, out += width) {
        const int32_t* coefficients = axis.coefficients + int64_t(i) * axis.taps;
        for (int64_t x = 0; x < width; x += BLOCK) {
            const Byte* from = in + axis.start[i] * stride + x;
            const int length = int(std::min(BLOCK, width - x));
            int32_t sums[BLOCK];
            std::fill(sums, sums + BLOCK, HALF);
            if (length == BLOCK) {
                for (int j = 0; j < axis.count[i]; j++)
                    for (int b = 0; b < BLOCK; b++) sums[b] += coefficients[j] * from[j * stride + b];
            } else {
                for (int j = 0; j < axis.count[i]; j++)
                    for (int b = 0; b < length; b++) sums[b] += coefficients[j] * from[j * stride + b];
            }
            for (int b = 0; b < length; b++) out[x + b] = clipped(sums[b] >> FRACTION);
        }
    }
}

#endif

// Count positions from the first that is needed, and return it and how many there are. They never go back.
int narrowed(Axis& axis, int number, int& needed) {
    const int first = axis.start[0];
    needed = axis.start[number - 1] + axis.count[number - 1] - first;
    for (int i = 0; i < number; i++) axis.start[i] -= first;
    return first;
}

void resize(const Byte* in, int64_t stride, int height, int width, Byte* out, int out_height, int out_width, int top,
            int left, int rows, int columns, bool is_cubic) {
    const bool is_high = out_height != height, is_wide = out_width != width;
    Axis vertical{}, horizontal{};
    int needed_rows = rows, needed_columns = columns;
    if (is_high) {
        vertical = axis_of<0>(height, out_height, top, rows, is_cubic);
        top = narrowed(vertical, rows, needed_rows);
    }
    if (is_wide) {
        horizontal = axis_of<1>(width, out_width, left, columns, is_cubic);
        left = narrowed(horizontal, columns, needed_columns);
    }
    in += top * stride + 3 * int64_t(left);
    const int64_t length = 3 * int64_t(columns), needed_length = 3 * int64_t(needed_columns);
    if (is_high && is_wide && height - out_height > std::max(0, 2 * (width - out_width))) {
        // Pillow since 13: the columns first where they lose more than twice as much as the rows.
        Byte* between = scratch<0, Byte>(rows * needed_length);
        down(in, stride, needed_rows, between, vertical, rows, needed_length);
        across(between, needed_length, rows, needed_columns, out, horizontal, columns);
    } else if (is_high && is_wide) {
        Byte* between = scratch<0, Byte>(needed_rows * length);
        across(in, stride, needed_rows, needed_columns, between, horizontal, columns);
        down(between, length, needed_rows, out, vertical, rows, length);
    } else if (is_wide) {
        across(in, stride, rows, needed_columns, out, horizontal, columns);
    } else if (is_high) {
        down(in, stride, needed_rows, out, vertical, rows, length);
    } else {
        for (int row = 0; row < rows; row++) std::memcpy(out + row * length, in + row * stride, length);
    }
}

// ----------------------------------------------------------------------------------------------------------- warping

constexpr int EDGE = 2;  // by so much the taps of a pixel may lie outside the image, where its border is repeated

typedef double Double4 __attribute__((vector_size(32)));

inline Double4 loaded(const double* from) {
    Double4 value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

// A vector of R, G, B and something for as many pixels as a processor takes at once, those at `from` + offsets[0], …
#if defined(__AVX512F__)
constexpr int AT_ONCE = 2;
typedef double Pixels __attribute__((vector_size(64)));
inline Pixels taken(const double* from, const int64_t* offsets) {
    const __m512d first = _mm512_castpd256_pd512(_mm256_loadu_pd(from + offsets[0]));
    return Pixels(_mm512_insertf64x4(first, _mm256_loadu_pd(from + offsets[1]), 1));
}
inline Pixels spread(const double* values) {
    const __m512d both = _mm512_castpd128_pd512(_mm_loadu_pd(values));
    return Pixels(_mm512_permutexvar_pd(_mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1), both));
}
#else
constexpr int AT_ONCE = 1;
typedef Double4 Pixels;
inline Pixels taken(const double* from, const int64_t* offsets) { return loaded(from + offsets[0]); }
inline Pixels spread(const double* values) { return Pixels{} + values[0]; }
#endif
typedef int32_t Ints __attribute__((vector_size(16 * AT_ONCE)));
typedef Byte Bytes __attribute__((vector_size(4 * AT_ONCE)));

inline void widen(uint32_t bytes, double* out) {
    const Double4 pixel = __builtin_convertvector(split(bytes), Double4);
    std::memcpy(out, &pixel, sizeof(pixel));
}

// The image in double as R, G, B and something, with its border repeated.
const double* widened(const Byte* in, int height, int width) {
    const int64_t across = 4 * int64_t(width + 2 * EDGE);
    double* out = scratch<0, double>(across * (height + 2 * EDGE));
    for (int y = 0; y < height; y++, in += 3 * int64_t(width)) {
        double* row = out + across * (y + EDGE);
        uint32_t bytes = 0;
        for (int x = 0; x < width - 1; x++) {
            std::memcpy(&bytes, in + 3 * x, 4);
            widen(bytes, row + 4 * (x + EDGE));
        }
        std::memcpy(&bytes, in + 3 * (width - 1), 3);  // behind the last one there may be nothing
        widen(bytes, row + 4 * (width + EDGE - 1));
        for (int x = 0; x < EDGE; x++) {
            std::memcpy(row + 4 * x, row + 4 * EDGE, sizeof(Double4));
            std::memcpy(row + 4 * (width + EDGE + x), row + 4 * (width + EDGE - 1), sizeof(Double4));
        }
    }
    for (int y = 0; y < EDGE; y++) {
        std::memcpy(out + across * y, out + across * EDGE, across * sizeof(double));
        std::memcpy(out + across * (height + EDGE + y), out + across * (height + EDGE - 1), across * sizeof(double));
    }
    return out;
}

// Between the second and the third of four neighbours, at d from the second. Sums of whole numbers are exact in any
// order, so this serves a row of pixels alone.
inline Pixels cubic_of_pixels(const double* from, const int64_t* offsets, Pixels d) {
    const Pixels v1 = taken(from, offsets), v2 = taken(from + 4, offsets), v3 = taken(from + 8, offsets);
    const Pixels a = v1 - v2, s = a + (v3 - taken(from + 12, offsets));
    return v2 + d * ((v3 - v1) + d * ((a + s) - d * s));
}

// The same with the roundings of Pillow's -v1 + v3, 2 * (v1 - v2) + v3 - v4 and -v1 + v2 - v3 + v4.
inline Pixels cubic_of_rows(Pixels v1, Pixels v2, Pixels v3, Pixels v4, Pixels d) {
    const Pixels a = v1 - v2;
    return v2 + d * ((v3 - v1) + d * (((a + a) + v3 - v4) + d * (v4 - (a + v3))));
}

inline Pixels linear(const double* from, const int64_t* offsets, Pixels d) {
    const Pixels v1 = taken(from, offsets);
    return v1 + (taken(from + 4, offsets) - v1) * d;
}

// What lies between pixels of a row of the output: in both directions, or, where a shear or a shift leaves the other one
// alone, within rows or within columns. A cubic at d = 0 is the second of its neighbours exactly.
enum Between { BOTH, WITHIN_ROWS, WITHIN_COLUMNS };

// Pixels whose first tap is at `from` + offsets[0], …
template <bool IS_CUBIC, Between BETWEEN>
inline Bytes interpolated(const double* from, int64_t stride, const int64_t* offsets, const double* dx,
                          const double* dy) {
    const Pixels right = spread(dx), below = spread(dy);
    Pixels found;
    if (IS_CUBIC && BETWEEN == WITHIN_ROWS) {
        found = cubic_of_pixels(from + stride, offsets, right);
    } else if (IS_CUBIC && BETWEEN == WITHIN_COLUMNS) {
        const double* second = from + 4;
        found = cubic_of_rows(taken(second, offsets), taken(second + stride, offsets),
                              taken(second + 2 * stride, offsets), taken(second + 3 * stride, offsets), below);
    } else if (IS_CUBIC) {
        found = cubic_of_rows(cubic_of_pixels(from, offsets, right), cubic_of_pixels(from + stride, offsets, right),
                              cubic_of_pixels(from + 2 * stride, offsets, right),
                              cubic_of_pixels(from + 3 * stride, offsets, right), below);
    } else {
        const Pixels above = linear(from, offsets, right);
        found = above + (linear(from + stride, offsets, right) - above) * below;
    }
    Ints values = __builtin_convertvector(found, Ints);
    values = values > 0 ? values : Ints{};
    values = values < 255 ? values : Ints{} + 255;
    return __builtin_convertvector(values, Bytes);
}

template <bool IS_CUBIC, Between BETWEEN>
inline void interpolate_row(const double* from, int64_t stride, const int64_t* offsets, const double* dx,
                            const double* dy, int first, int last, Byte* out) {
    for (int x = first; x < last; x += AT_ONCE) {
        const Bytes found = interpolated<IS_CUBIC, BETWEEN>(from, stride, offsets + x, dx + x, dy + x);
        Byte pixels[sizeof(found)];
        std::memcpy(pixels, &found, sizeof(found));
        for (int k = 0; k < std::min(AT_ONCE, last - x); k++) std::memcpy(out + 3 * (x + k), pixels + 4 * k, 3);
    }
}

template <bool IS_CUBIC>
void warp(const Byte* in, int height, int width, Byte* out, const double* m, const Byte* fill) {
    const double* wide = widened(in, height, width);
    const int64_t stride = 4 * int64_t(width + 2 * EDGE);
    double* xs = scratch<1, double>(2 * int64_t(width + AT_ONCE));
    double* ys = xs + width + AT_ONCE;
    int64_t* offsets = scratch<1, int64_t>(width + AT_ONCE);
    for (int y = 0; y < height; y++, out += 3 * int64_t(width)) {
        for (int x = 0; x < width; x++) {
            xs[x] = m[0] * (x + 0.5) + m[1] * (y + 0.5) + m[2];
            ys[x] = m[3] * (x + 0.5) + m[4] * (y + 0.5) + m[5];
        }
        // Coordinates rise or fall along a row, rounded too, so what comes from inside the image is in one piece.
        const auto is_inside = [&](int x) { return xs[x] >= 0.0 && xs[x] < width && ys[x] >= 0.0 && ys[x] < height; };
        int first = 0, last = width;
        while (first < last && !is_inside(first)) std::memcpy(out + 3 * first++, fill, 3);
        while (last > first && !is_inside(last - 1)) std::memcpy(out + 3 * --last, fill, 3);
        bool is_on_columns = true, is_on_rows = true;
        for (int x = first; x < last; x++) {
            const double left = std::floor(xs[x] - 0.5), top = std::floor(ys[x] - 0.5);
            offsets[x] = stride * (int(top) + EDGE - IS_CUBIC) + 4 * (int(left) + EDGE - IS_CUBIC);
            xs[x] = xs[x] - 0.5 - left;
            ys[x] = ys[x] - 0.5 - top;
            is_on_columns &= xs[x] == 0;
            is_on_rows &= ys[x] == 0;
        }
        for (int k = 0; k < AT_ONCE && last > first; k++) {  // what the last vector has too many
            offsets[last + k] = offsets[last - 1];
            xs[last + k] = ys[last + k] = 0;
        }
        const auto row = is_on_rows      ? interpolate_row<IS_CUBIC, WITHIN_ROWS>
                         : is_on_columns ? interpolate_row<IS_CUBIC, WITHIN_COLUMNS>
                                         : interpolate_row<IS_CUBIC, BOTH>;
        row(wide, stride, offsets, xs, ys, first, last, out);
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
    uint32_t parts[TABLES][3][256] = {};
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
    constexpr int64_t BLOCK = 64;  // in three loops that each compile to vector instructions
    for (; number > 0; number -= BLOCK, in += 3 * BLOCK, out += 3 * BLOCK) {
        const int length = int(std::min(BLOCK, number));
        Byte grays[BLOCK], from[3 * BLOCK];
        for (int i = 0; i < length; i++) grays[i] = Byte(gray(in + 3 * i));
        for (int i = 0; i < BLOCK; i++) from[3 * i] = from[3 * i + 1] = from[3 * i + 2] = grays[i];
        for (int i = 0; i < 3 * length; i++) out[i] = blended(from[i], in[i], factor);
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
    for (int y = 0; y < height; y++, in += 3 * int64_t(width), out += 3 * int64_t(width))
        for (int x = 0; x < width; x++) std::memcpy(out + 3 * x, in + 3 * (width - 1 - x), 3);
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
