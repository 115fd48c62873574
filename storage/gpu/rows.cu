// Kernels over rows in GPU memory. storage/gpu/source.py adds the steps of the optimizers.
//
// NVRTC compiles this source for a GPU. Tests compile it with g++, over tests/gpu/shim.h.
// It must be compiled with --fmad=false and without -ftz, so that float arithmetic gives the bits
// of the CPU.
//
//   pieces  the slab, in pieces of 1 << shift rows; a row has ``stride`` numbers, a multiple of 4
//   slots   [n]  positions of rows, distinct; -1 where gather and scatter shall do nothing
//   n       number of rows
//   count   how many numbers of each row, from its first, are meant; a step takes dim
//
// LANES threads work on a row. A thread handles W numbers at once: 4 where all vectors of a row
// begin at multiples of 16 bytes, else 1. All threads of a row leave a kernel together.
typedef long long i64;
#define LANES 8
#define SLAB float* const* pieces, int shift, i64 stride, const i64* slots, i64 n, int count

template <int W> struct Pack { float at[W]; };

template <int W> __device__ inline Pack<W> load(const float* from) {
    Pack<W> pack;
    if constexpr (W == 4) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        pack.at[0] = four.x; pack.at[1] = four.y; pack.at[2] = four.z; pack.at[3] = four.w;
    } else {
        pack.at[0] = from[0];
    }
    return pack;
}

template <int W> __device__ inline void store(float* to, const Pack<W>& pack) {
    if constexpr (W == 4)
        *reinterpret_cast<float4*>(to) =
            make_float4(pack.at[0], pack.at[1], pack.at[2], pack.at[3]);
    else
        to[0] = pack.at[0];
}

// Declares the number i of this thread's row, its lane (0..LANES-1) and the threads of the row
// (``group``), and leaves if there are not so many rows.
#define THREAD(ROWS)                                                              \
    const i64 i = (i64)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;   \
    const int lane = threadIdx.x % LANES;                                         \
    const unsigned group = 0xffu << (threadIdx.x & 24);                           \
    (void)lane; (void)group;                                                      \
    if (i >= (ROWS)) return;

__device__ inline float* row_at(float* const* pieces, int shift, i64 stride, i64 slot) {
    return pieces[slot >> shift] + (slot & ((1LL << shift) - 1)) * stride;
}

// Returns the value that lane 0 of the row gives.
__device__ inline float from_first(unsigned group, float value) {
    return __shfl_sync(group, value, 0, LANES);
}

// Returns the sum of squares of ``count`` numbers, rounded to float32 once, in all lanes.
__device__ inline double square_sum64(unsigned group, const float* numbers, int lane, int count) {
    double sum = 0.0;
    for (int j = lane; j < count; j += LANES) sum += (double)numbers[j] * (double)numbers[j];
    for (int apart = LANES / 2; apart > 0; apart /= 2)
        sum += __shfl_xor_sync(group, sum, apart, LANES);
    return sum;
}

__device__ inline float square_sum(unsigned group, const float* numbers, int lane, int count) {
    return (float)square_sum64(group, numbers, lane, count);
}

template <int W>
__device__ inline void copy(float* to, const float* from, int lane, int count) {
    for (int j = W * lane; j < count; j += W * LANES) store<W>(to + j, load<W>(from + j));
}

// Copies two rows at once; one of the addresses may be null, and its row is then not copied.
template <int W>
__device__ inline void copy_two(
    float* to, const float* from, float* to2, const float* from2, int lane, int count) {
    for (int j = W * lane; j < count; j += W * LANES) {
        Pack<W> first, second;
        if (from) first = load<W>(from + j);
        if (from2) second = load<W>(from2 + j);
        if (from) store<W>(to + j, first);
        if (from2) store<W>(to2 + j, second);
    }
}

// out[i] = the first ``count`` numbers of the row in slots[i]. Each thread copies parts of two rows,
// so that it waits for both reads at once.
extern "C" __global__ void gather(SLAB, float* out) {
    const i64 half = (n + 1) / 2;
    THREAD(half)
    const i64 k = i + half, slot = slots[i], slot2 = k < n ? slots[k] : -1;
    const float* row = slot < 0 ? nullptr : row_at(pieces, shift, stride, slot);
    const float* row2 = slot2 < 0 ? nullptr : row_at(pieces, shift, stride, slot2);
    if (count & 3) copy_two<1>(out + i * count, row, out + k * count, row2, lane, count);
    else copy_two<4>(out + i * count, row, out + k * count, row2, lane, count);
}

// the first ``count`` numbers of the row in slots[i] = rows[i]
extern "C" __global__ void scatter(SLAB, const float* rows) {
    THREAD(n)
    const i64 slot = slots[i];
    if (slot < 0) return;
    float* row = row_at(pieces, shift, stride, slot);
    if (count & 3) copy<1>(row, rows + i * count, lane, count);
    else copy<4>(row, rows + i * count, lane, count);
}

// norms[i] = the L2 norm of the first ``count`` numbers of a row, rounded to float32
extern "C" __global__ void measure(SLAB, double* norms) {
    THREAD(n)
    const float* row = row_at(pieces, shift, stride, slots[i]);
    const double sum = square_sum64(group, row, lane, count);
    if (lane == 0) norms[i] = (double)(float)sqrt(sum);
}

// most[i] = the bits of the largest magnitude in a row; infinity and NaN count as the largest
extern "C" __global__ void largest(SLAB, unsigned* most) {
    THREAD(n)
    const unsigned* row =
        reinterpret_cast<const unsigned*>(row_at(pieces, shift, stride, slots[i]));
    unsigned bits = 0;
    for (int j = lane; j < count; j += LANES) {
        const unsigned one = row[j] & 0x7fffffffu;
        bits = one > bits ? one : bits;
    }
    for (int apart = LANES / 2; apart > 0; apart /= 2) {
        const unsigned other = __shfl_xor_sync(group, bits, apart, LANES);
        bits = other > bits ? other : bits;
    }
    if (lane == 0) most[i] = bits;
}

// pieces[first + i] = address[i]: makes new pieces of the slab known
extern "C" __global__ void add_pieces(float** pieces, i64 n, i64 first, float* const* address) {
    THREAD(n)
    if (lane == 0) pieces[first + i] = address[i];
}
