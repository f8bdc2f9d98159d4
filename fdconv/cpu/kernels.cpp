// The steps of fdconv/cpu/sample_loop.py that pass over weights, each in one pass over memory. Plain C++, without headers of
// torch, so that it is compiled in a few seconds; fdconv/cpu/kernels.py compiles, loads and calls it.
//
// Everything is float32 and contiguous. Half spectra that a complex transform runs over lie transposed, with the axis
// that it transforms last: MKL would otherwise read them with a stride, and take longer.
//
// Sums over parts of the work go to one place for each part, and are added up by whoever called. What a part is does not
// depend on the number of threads, so neither does the result.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Int = std::int64_t;
using Pair = std::uint64_t;  // a complex number, moved as one

// What is transposed at a time: a column of a tile is a cache line, so that none is visited twice.
constexpr Int TILE_ROWS = 8, TILE_COLUMNS = 64;
constexpr Int BLOCK = 128;  // input channels at a time: what is computed of them stays in the first cache

inline Int parts(Int size, Int part) { return (size + part - 1) / part; }

// Tell the cache that some values will be read. Tiles are short pieces of many rows, which it does not foresee.
template <typename Value>
inline void prefetch(const Value* values, Int count) {
    for (Int i = 0; i < count; i += Int(64 / sizeof(Value))) __builtin_prefetch(values + i);
}

// exp(x): 2^n times a polynomial of what remains, of magnitude up to ln(2)/2. Relative error below 2e-7. In plain
// operations, so that compilers vectorise it.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
    const float shifted = x * 1.44269504f + shift;
    const float n = shifted - shift;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    std::int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4B400000 + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

inline float sigmoid(float z) { return 1.0f / (1.0f + exponential(-z)); }

// Another factor, of the columns before `first` and from `last` on.
struct Edges {
    float factor;
    Int first, last;
};

// Gives the highest number of a group, in place of which `groups - 1` is looked up where it is beyond.
template <typename Group>
std::uint32_t scale(const float* spectra, const Group* group, const float* tables, float* out, Int ratio, Int rows,
                    Int columns, Int samples, Int groups, const Edges& edges, int threads) {
    const Int across = parts(columns, TILE_COLUMNS);
    const std::uint32_t last = static_cast<std::uint32_t>(groups - 1);
    std::uint32_t highest = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : highest)
    for (Int tile = 0; tile < parts(rows, TILE_ROWS) * across; ++tile) {
        const Int top = tile / across * TILE_ROWS, left = tile % across * TILE_COLUMNS;
        const Int height = std::min(TILE_ROWS, rows - top), width = std::min(TILE_COLUMNS, columns - left);
        alignas(64) float scaled[TILE_ROWS][2 * TILE_COLUMNS];
        alignas(64) std::uint32_t numbers[TILE_ROWS][TILE_COLUMNS];
        for (Int row = 0; row < height; ++row) {
            const Group* own = group + (top + row) * columns + left;
            prefetch(own + TILE_COLUMNS, TILE_COLUMNS);
#pragma omp simd reduction(max : highest)
            for (Int column = 0; column < width; ++column) {
                const std::uint32_t number = static_cast<std::uint32_t>(own[column]);
                highest = number > highest ? number : highest;
                numbers[row][column] = number < last ? number : last;
            }
        }
        for (Int sample = 0; sample < samples; ++sample) {
            for (Int row = 0; row < height; ++row) {
                const Int at = (top + row) * columns + left;
                float* target = rows == 1 ? out + 2 * (sample * columns + left) : scaled[row];
                for (Int share = 0; share < ratio; ++share) {
                    const float* table = tables + (sample * ratio + share) * groups;
                    const float* source = spectra + 2 * (share * rows * columns + at);
                    prefetch(source + 2 * TILE_COLUMNS, 2 * TILE_COLUMNS);
                    if (share == 0) {
#pragma omp simd
                        for (Int column = 0; column < width; ++column) {
                            const float gain = table[numbers[row][column]];
                            target[2 * column] = gain * source[2 * column];
                            target[2 * column + 1] = gain * source[2 * column + 1];
                        }
                    } else {
#pragma omp simd
                        for (Int column = 0; column < width; ++column) {
                            const float gain = table[numbers[row][column]];
                            target[2 * column] += gain * source[2 * column];
                            target[2 * column + 1] += gain * source[2 * column + 1];
                        }
                    }
                }
                for (Int i = 0; i < 2 * std::min(width, edges.first - left); ++i) target[i] *= edges.factor;
                for (Int i = 2 * std::max(Int(0), std::max(edges.first, edges.last) - left); i < 2 * width; ++i)
                    target[i] *= edges.factor;
            }
            if (rows == 1) continue;  // nothing need be turned over
            Pair* place = reinterpret_cast<Pair*>(out) + (sample * columns + left) * rows + top;
            for (Int column = 0; column < width; ++column)
                for (Int row = 0; row < height; ++row)
                    std::memcpy(place + column * rows + row, &scaled[row][2 * column], 8);
        }
    }
    return highest;
}

// A weight's shape, and the factors of its modulation. A gate is half the factor of the local branch.
struct Weight {
    Int samples, filters, channels, groups, height, width, tap_count;
    const float* context;  // (samples, groups*channels + taps - 1), with zeros at its ends; null without local branch
    const float* taps;     // (taps, filters, height*width)
    const float* rows;     // (samples, filters, height*width)
    const float* columns;  // (samples, groups*channels)

    Int positions() const { return height * width; }
    Int all_channels() const { return groups * channels; }
    Int first_channel(Int filter) const { return filter / (filters / groups) * channels; }
    const float* seen(Int sample, Int channel) const {
        return context + sample * (all_channels() + tap_count - 1) + channel;
    }
};

// The gates of some input channels. TAPS is their number where the compiler is to know it, else 0.
template <Int TAPS>
void gates_of(const Weight& w, const float* seen, Int row, Int size, float* gate) {
    const Int count = TAPS ? TAPS : w.tap_count, apart = w.filters * w.positions();
#pragma omp simd
    for (Int i = 0; i < size; ++i) {
        float logit = 0.0f;
        for (Int tap = 0; tap < count; ++tap) logit += w.taps[tap * apart + row] * seen[tap + i];
        gate[i] = sigmoid(logit);
    }
}

inline void gates(const Weight& w, const float* seen, Int row, Int size, float* gate) {
    switch (w.tap_count) {
        case 3: return gates_of<3>(w, seen, row, size, gate);
        case 5: return gates_of<5>(w, seen, row, size, gate);
        case 7: return gates_of<7>(w, seen, row, size, gate);
        default: return gates_of<0>(w, seen, row, size, gate);
    }
}

// HEIGHT and WIDTH are those of the kernel where the compiler is to know them, else 0.
template <Int HEIGHT, Int WIDTH>
void modulate(const Weight& w, const float* image, float* out, int threads) {
    const Int k_h = HEIGHT ? HEIGHT : w.height, k_w = WIDTH ? WIDTH : w.width, positions = k_h * k_w;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Int each = 0; each < w.samples * w.filters; ++each) {
        const Int sample = each / w.filters, filter = each % w.filters, first = w.first_channel(filter);
        const float* columns = w.columns + sample * w.all_channels() + first;
        alignas(64) float gate[BLOCK];
        for (Int start = 0; start < w.channels; start += BLOCK) {
            const Int size = std::min(BLOCK, w.channels - start);
            for (Int p = 0; p < positions; ++p) {
                if (w.context)
                    gates(w, w.seen(sample, first + start), filter * positions + p, size, gate);
                else
                    std::fill(gate, gate + size, 1.0f);
                const float row = w.rows[each * positions + p];
                const float* source = image + ((each * k_h + p / k_w) * w.channels + start) * k_w + p % k_w;
                float* target = out + (each * w.channels + start) * positions + p;
#pragma omp simd
                for (Int i = 0; i < size; ++i)
                    target[i * positions] = source[i * k_w] * gate[i] * columns[start + i] * row;
            }
        }
    }
}

// Gradients, from those of the weights. What belongs to input channels is added up over PART filters of one sample.
constexpr Int PART = 32;

struct Gradients {
    float* image;    // as the image
    float* rows;     // as the rows
    float* taps;     // (samples, taps, filters, height*width)
    float* columns;  // (samples, parts, groups*channels), zero before
    float* context;  // (samples, parts, groups*channels + taps - 1), zero before
};

template <Int HEIGHT, Int WIDTH>
void modulate_backward(const Weight& w, const Gradients& to, const float* above, const float* image, int threads) {
    const Int k_h = HEIGHT ? HEIGHT : w.height, k_w = WIDTH ? WIDTH : w.width, positions = k_h * k_w;
    const Int each_sample = parts(w.filters, PART), padded = w.all_channels() + w.tap_count - 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Int part = 0; part < w.samples * each_sample; ++part) {
        const Int sample = part / each_sample, last = std::min(w.filters, (part % each_sample + 1) * PART);
        alignas(64) float gate[BLOCK], slope[BLOCK];
        for (Int filter = part % each_sample * PART; filter < last; ++filter) {
            const Int each = sample * w.filters + filter, first = w.first_channel(filter);
            for (Int p = 0; p < positions; ++p) {
                const Int row = filter * positions + p;
                const float factor = w.rows[each * positions + p];
                float to_row = 0.0f;
                for (Int tap = 0; w.context && tap < w.tap_count; ++tap)
                    to.taps[(sample * w.tap_count + tap) * w.filters * positions + row] = 0.0f;
                for (Int start = 0; start < w.channels; start += BLOCK) {
                    const Int size = std::min(BLOCK, w.channels - start), channel = first + start;
                    if (w.context)
                        gates(w, w.seen(sample, channel), row, size, gate);
                    else
                        std::fill(gate, gate + size, 1.0f);
                    const float* columns = w.columns + sample * w.all_channels() + channel;
                    float* to_columns = to.columns + part * w.all_channels() + channel;
                    const Int at = ((each * k_h + p / k_w) * w.channels + start) * k_w + p % k_w;
                    const float* grad = above + (each * w.channels + start) * positions + p;
#pragma omp simd reduction(+ : to_row)
                    for (Int i = 0; i < size; ++i) {
                        const float scaled = grad[i * positions] * gate[i];
                        const float product = scaled * image[at + i * k_w];
                        to.image[at + i * k_w] = scaled * factor * columns[i];
                        to_columns[i] += product * factor;
                        to_row += product * columns[i];
                        // Of log(sigmoid(z)) the derivative is 1 - sigmoid(z).
                        slope[i] = product * (1.0f - gate[i]) * columns[i] * factor;
                    }
                    for (Int tap = 0; w.context && tap < w.tap_count; ++tap) {
                        const Int place = tap * w.filters * positions + row;
                        const float own = w.taps[place];
                        const float* seen = w.seen(sample, channel) + tap;
                        float* to_seen = to.context + part * padded + channel + tap;
                        float total = 0.0f;
#pragma omp simd reduction(+ : total)
                        for (Int i = 0; i < size; ++i) {
                            total += slope[i] * seen[i];
                            to_seen[i] += slope[i] * own;
                        }
                        to.taps[sample * w.tap_count * w.filters * positions + place] += total;
                    }
                }
                to.rows[each * positions + p] = to_row;
            }
        }
    }
}

// A row of tiles is a part. Neighbours are of one group, so sums go to four places in turn, or each would wait for the
// last.
template <typename Group>
void scale_backward(const float* above, const float* spectra, const Group* group, const float* tables,
                    float* to_spectra, float* to_tables, Int ratio, Int rows, Int columns, Int samples, Int groups,
                    int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Int part = 0; part < parts(rows, TILE_ROWS); ++part) {
        const Int top = part * TILE_ROWS, height = std::min(TILE_ROWS, rows - top);
        alignas(64) float own[TILE_ROWS][2 * TILE_COLUMNS], products[TILE_COLUMNS];
        std::vector<float> lanes(4 * groups);
        for (Int each = 0; each < samples * ratio; ++each) {
            const Int sample = each / ratio, share = each % ratio;
            const float* table = tables + each * groups;
            std::fill(lanes.begin(), lanes.end(), 0.0f);
            for (Int left = 0; left < columns; left += TILE_COLUMNS) {
                const Int width = std::min(TILE_COLUMNS, columns - left);
                const Pair* source = reinterpret_cast<const Pair*>(above) + (sample * columns + left) * rows + top;
                for (Int column = 0; column < width; ++column) {
                    __builtin_prefetch(source + (TILE_COLUMNS + column) * rows);
                    for (Int row = 0; row < height; ++row)
                        std::memcpy(&own[row][2 * column], source + column * rows + row, 8);
                }
                for (Int row = 0; row < height; ++row) {
                    const Int at = (top + row) * columns + left;
                    const float* spectrum = spectra + 2 * (share * rows * columns + at);
                    float* to = to_spectra + 2 * (share * rows * columns + at);
#pragma omp simd
                    for (Int column = 0; column < width; ++column) {
                        const float gain = table[group[at + column]];
                        const float real = own[row][2 * column], imaginary = own[row][2 * column + 1];
                        products[column] = real * spectrum[2 * column] + imaginary * spectrum[2 * column + 1];
                        to[2 * column] += gain * real;
                        to[2 * column + 1] += gain * imaginary;
                    }
                    for (Int column = 0; column < width; ++column)
                        lanes[column % 4 * groups + group[at + column]] += products[column];
                }
            }
            float* sums = to_tables + (part * samples * ratio + each) * groups;
            for (Int i = 0; i < groups; ++i)
                sums[i] = (lanes[i] + lanes[groups + i]) + (lanes[2 * groups + i] + lanes[3 * groups + i]);
        }
    }
}

}  // namespace

extern "C" {

// Half spectra scaled by their groups' factors and summed over `ratio`: `(samples, columns, rows, 2)`.
// Gives the highest number of a group, which should be below `groups`. A column is scaled by the edges' factor once.
// spectra (ratio, rows, columns, 2); group (rows, columns), of bytes or 32-bit integers; tables (samples, ratio,
// groups).
std::uint32_t fdconv_scale(const float* spectra, const void* group, int group_bytes, const float* tables, float* out,
                           Int ratio, Int rows, Int columns, Int samples, Int groups, const Edges* edges,
                           int threads) {
    if (group_bytes == 1)
        return scale(spectra, static_cast<const std::uint8_t*>(group), tables, out, ratio, rows, columns, samples,
                     groups, *edges, threads);
    return scale(spectra, static_cast<const std::int32_t*>(group), tables, out, ratio, rows, columns, samples, groups,
                 *edges, threads);
}

// Complex numbers `(samples, rows, columns)` to `(samples, columns, rows)`.
void fdconv_transpose(const Pair* in, Pair* out, Int samples, Int rows, Int columns, int threads) {
    const Int down = parts(rows, TILE_ROWS), across = parts(columns, TILE_COLUMNS);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Int tile = 0; tile < samples * down * across; ++tile) {
        const Int sample = tile / (down * across), top = tile / across % down * TILE_ROWS;
        const Int left = tile % across * TILE_COLUMNS;
        const Int height = std::min(TILE_ROWS, rows - top), width = std::min(TILE_COLUMNS, columns - left);
        const Pair* source = in + (sample * rows + top) * columns + left;
        Pair* target = out + (sample * columns + left) * rows + top;
        alignas(64) Pair held[TILE_ROWS][TILE_COLUMNS];
        for (Int row = 0; row < height; ++row) {
            prefetch(source + row * columns + TILE_COLUMNS, TILE_COLUMNS);
            std::memcpy(held[row], source + row * columns, width * 8);
        }
        for (Int column = 0; column < width; ++column)
            for (Int row = 0; row < height; ++row) target[column * rows + row] = held[row][column];
    }
}

// Weights `(samples, filters, channels, height, width)` of images `(samples, filters*height, channels*width)`.
void fdconv_modulate(const Weight* w, const float* image, float* out, int threads) {
    if (w->height == 1 && w->width == 1)
        modulate<1, 1>(*w, image, out, threads);
    else if (w->height == 3 && w->width == 3)
        modulate<3, 3>(*w, image, out, threads);
    else
        modulate<0, 0>(*w, image, out, threads);
}

// Filters of one part of the gradients of what belongs to input channels.
Int fdconv_part() { return PART; }

// Gradients of what `fdconv_modulate` takes, from those of the weights.
void fdconv_modulate_backward(const Weight* w, const Gradients* to, const float* above, const float* image,
                              int threads) {
    if (w->height == 1 && w->width == 1)
        modulate_backward<1, 1>(*w, *to, above, image, threads);
    else if (w->height == 3 && w->width == 3)
        modulate_backward<3, 3>(*w, *to, above, image, threads);
    else
        modulate_backward<0, 0>(*w, *to, above, image, threads);
}

// Rows of one part of the gradient to the tables.
Int fdconv_tile() { return TILE_ROWS; }

// Gradients of what `fdconv_scale` takes, from those of its result. What goes to the spectra is added to `to_spectra`;
// `to_tables (parts, samples, ratio, groups)` has a part for each row of tiles.
void fdconv_scale_backward(const float* above, const float* spectra, const void* group, int group_bytes,
                           const float* tables, float* to_spectra, float* to_tables, Int ratio, Int rows, Int columns,
                           Int samples, Int groups, int threads) {
    if (group_bytes == 1)
        scale_backward(above, spectra, static_cast<const std::uint8_t*>(group), tables, to_spectra, to_tables, ratio,
                       rows, columns, samples, groups, threads);
    else
        scale_backward(above, spectra, static_cast<const std::int32_t*>(group), tables, to_spectra, to_tables, ratio,
                       rows, columns, samples, groups, threads);
}
}
