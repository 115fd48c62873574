// The loops of storage/kernels.py and storage/index.py as a C++ programmer would write them, and
// two roofs of the machine: what numba is measured against. build.py compiles and declares them.
//
// A location is slot + 1; 0 marks an empty entry and an absent key. A row is
// [embedding | accumulator], `width` floats of which the first `dim` are the embedding.
// Nothing is checked: slots are within the slab, masks are a power of two minus one, an index
// has at least one empty entry.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t LINE = 64;         // bytes in a cache line
constexpr int64_t KEYS_AHEAD = 16;   // keys whose entries are asked for before they are needed
constexpr int64_t ROWS_AHEAD = 8;    // rows asked for before they are needed
constexpr int64_t LINES_AHEAD = 32;  // lines asked for ahead where nothing else is done

struct Entry {
    uint64_t key;
    uint64_t location;
};

// The finalizer of splitmix64 (Stafford's variant 13 of the MurmurHash3 one).
inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

inline const Entry* as_entries(const uint64_t* entries) {
    return reinterpret_cast<const Entry*>(entries);
}

// The entry of `key`, or the empty one where it would go.
inline uint64_t probe(const Entry* entries, uint64_t mask, uint64_t key) {
    uint64_t at = mix(key) & mask;
    while (entries[at].location != 0 && entries[at].key != key) at = (at + 1) & mask;
    return at;
}

// Asks for every cache line that holds some of `bytes` from `start`; WRITE 1 to write them.
template <int WRITE>
inline void prefetch(const void* start, int64_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(start);
    for (uintptr_t line = first & ~uintptr_t(LINE - 1); line < first + bytes; line += LINE)
        __builtin_prefetch(reinterpret_cast<const void*>(line), WRITE, 3);
}

inline void copy(float* __restrict__ out, const float* __restrict__ in, int64_t count) {
    for (int64_t j = 0; j < count; ++j) out[j] = in[j];
}

inline void add(float* __restrict__ out, const float* __restrict__ in, int64_t count) {
    for (int64_t j = 0; j < count; ++j) out[j] += in[j];
}

double seconds() {
    using clock = std::chrono::steady_clock;
    return std::chrono::duration<double>(clock::now().time_since_epoch()).count();
}

}  // namespace

extern "C" {

// entries  uint64[mask + 1, 2]  key, location
// keys     uint64[n]
// out      int64[n]             the location of each key, 0 for absent ones
void index_find(const uint64_t* entries, uint64_t mask, const uint64_t* keys, int64_t n,
                int64_t* out) {
    const Entry* table = as_entries(entries);
    for (int64_t i = 0; i < std::min(KEYS_AHEAD, n); ++i)
        __builtin_prefetch(&table[mix(keys[i]) & mask]);
    for (int64_t i = 0; i < n; ++i) {
        if (i + KEYS_AHEAD < n) __builtin_prefetch(&table[mix(keys[i + KEYS_AHEAD]) & mask]);
        out[i] = table[probe(table, mask, keys[i])].location;
    }
}

// Adds keys or gives present ones another location; returns how many were added. The caller
// leaves enough empty entries.
//
// locations  int64[n]  none is 0
int64_t index_insert(uint64_t* entries, uint64_t mask, const uint64_t* keys,
                     const int64_t* locations, int64_t n) {
    Entry* table = reinterpret_cast<Entry*>(entries);
    int64_t added = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (i + KEYS_AHEAD < n) __builtin_prefetch(&table[mix(keys[i + KEYS_AHEAD]) & mask], 1);
        Entry& entry = table[probe(table, mask, keys[i])];
        added += entry.location == 0;
        entry.key = keys[i];
        entry.location = locations[i];
    }
    return added;
}

// Copies the embeddings of `slots`; rows of negative slots stay as they are.
//
// slab   float32[capacity, width]
// slots  int64[n]
// out    float32[n, dim]
void gather(const float* slab, int64_t width, int64_t dim, const int64_t* slots, int64_t n,
            float* out) {
    const int64_t bytes = dim * sizeof(float);
    for (int64_t i = 0; i < std::min(ROWS_AHEAD, n); ++i)
        prefetch<0>(slab + slots[i] * width, bytes);
    for (int64_t i = 0; i < n; ++i) {
        if (i + ROWS_AHEAD < n) prefetch<0>(slab + slots[i + ROWS_AHEAD] * width, bytes);
        if (slots[i] >= 0) copy(out + i * dim, slab + slots[i] * width, dim);
    }
}

// index_find and gather in one pass: a key's entry is asked for first, its row ROWS_AHEAD keys
// before the copy, so the two misses of one key overlap those of the others.
//
// out  float32[n, dim]  rows of absent keys stay as they are
void find_gather(const uint64_t* entries, uint64_t mask, const uint64_t* keys, int64_t n,
                 const float* slab, int64_t width, int64_t dim, float* out) {
    const Entry* table = as_entries(entries);
    const int64_t bytes = dim * sizeof(float);
    constexpr int64_t RING = 2 * ROWS_AHEAD;
    int64_t slots[RING];
    for (int64_t i = -KEYS_AHEAD - ROWS_AHEAD; i < n; ++i) {
        const int64_t asked = i + ROWS_AHEAD + KEYS_AHEAD;
        if (asked < n) __builtin_prefetch(&table[mix(keys[asked]) & mask]);
        const int64_t found = i + ROWS_AHEAD;
        if (found >= 0 && found < n) {
            const int64_t slot = int64_t(table[probe(table, mask, keys[found])].location) - 1;
            slots[found % RING] = slot;
            prefetch<0>(slab + slot * width, bytes);
        }
        if (i >= 0 && slots[i % RING] >= 0)
            copy(out + i * dim, slab + slots[i % RING] * width, dim);
    }
}

// One Adagrad step in place: accumulator += g * g, embedding -= lr * g / (sqrt(accumulator) + eps).
//
// slab   float32[capacity, width]  width >= 2 * dim
// slots  int64[n]                  distinct
// grads  float32[n, dim]
void adagrad(float* slab, int64_t width, int64_t dim, const int64_t* slots, const float* grads,
             int64_t n, float lr, float eps) {
    const int64_t bytes = 2 * dim * sizeof(float);
    for (int64_t i = 0; i < std::min(ROWS_AHEAD, n); ++i)
        prefetch<1>(slab + slots[i] * width, bytes);
    for (int64_t i = 0; i < n; ++i) {
        if (i + ROWS_AHEAD < n) prefetch<1>(slab + slots[i + ROWS_AHEAD] * width, bytes);
        float* __restrict__ embedding = slab + slots[i] * width;
        float* __restrict__ accumulator = embedding + dim;
        const float* __restrict__ grad = grads + i * dim;
        for (int64_t j = 0; j < dim; ++j) {
            const float sum = accumulator[j] + grad[j] * grad[j];
            accumulator[j] = sum;
            embedding[j] -= lr * grad[j] / (std::sqrt(sum) + eps);
        }
    }
}

// Distinct keys in the order they first appear, and the sum of each one's gradients; returns how
// many there are.
//
// keys      uint64[n]
// grads     float32[n, dim]
// distinct  uint64[n]          the first u are written
// inverse   int64[n]           where in `distinct` each key is
// sums      float32[n, dim]    the first u rows are written
// scratch   int32[mask + 1]    overwritten; mask + 1 > n, twice as many or more to be fast
int64_t unique_sum(const uint64_t* keys, int64_t n, const float* grads, int64_t dim,
                   uint64_t* distinct, int64_t* inverse, float* sums, int32_t* scratch,
                   uint64_t mask) {
    std::memset(scratch, 0, (mask + 1) * sizeof(int32_t));
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint64_t at = mix(keys[i]) & mask;
        while (scratch[at] != 0 && distinct[scratch[at] - 1] != keys[i]) at = (at + 1) & mask;
        if (scratch[at] == 0) {
            distinct[count] = keys[i];
            copy(sums + count * dim, grads + i * dim, dim);
            inverse[i] = count;
            scratch[at] = int32_t(++count);
        } else {
            inverse[i] = scratch[at] - 1;
            add(sums + inverse[i] * dim, grads + i * dim, dim);
        }
    }
    return count;
}

// Nanoseconds per read of a random cache line when no read waits for another.
//
// array  uint64[8 * lines]  64-byte aligned, far larger than the caches; lines < 2**32
// n      reads, at lines drawn from `seed`
double random_access_roof(const uint64_t* array, uint64_t lines, int64_t n, uint64_t seed) {
    const auto line = [&](uint64_t i) { return array + 8 * ((mix(seed + i) >> 32) * lines >> 32); };
    uint64_t sum = 0;
    const double start = seconds();
    for (int64_t i = 0; i < n; ++i) {
        __builtin_prefetch(line(i + LINES_AHEAD));
        sum += *line(i);
    }
    const double taken = seconds() - start;
    asm volatile("" : : "r"(sum));  // or the loop would go
    return taken * 1e9 / n;
}

// Gigabytes (10**9) copied per second by memcpy, the best of `repeats`; each byte is counted once.
//
// source, target  uint8[bytes]
double copy_roof(void* target, const void* source, int64_t bytes, int64_t repeats) {
    double best = 0;
    for (int64_t i = 0; i < repeats; ++i) {
        const double start = seconds();
        std::memcpy(target, source, bytes);
        asm volatile("" : : "r"(target) : "memory");
        best = std::max(best, bytes / (seconds() - start) / 1e9);
    }
    return best;
}

}  // extern "C"
