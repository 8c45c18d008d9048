// What the attention backward reads of its queries: the LSE to base 2 and delta = rowsum(dO O) - dLSE, in fp32.
//
// Bound by memory: every element of dO and O is read once. A block takes ROWS rows of stats of one head; neighbouring
// blocks take the heads of the same tokens, which lie side by side in memory.
#include "attention_bwd.h"

#include <cmath>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace stattn {
namespace {

constexpr int THREADS = 256;
constexpr int ROWS = 64;

struct Parameters {
    const void *out, *dout;
    int64_t out_batch, out_token, out_head, dout_batch, dout_token, dout_head;  // strides in elements
    const float *lse, *dlse;
    float* stats;
    int64_t of_delta;  // from a row's LSE to its delta
    attention_bwd::StatsPlaces places;
    int before, after, width;  // width: of the last axis
    int heads, head_dim, queries, chunks;
};

// The token whose stats lie at `row`, or -1 for padding.
__device__ __forceinline__ int token_at(const Parameters& p, int row) {
    if (row < p.places.video) return row < p.before ? row : -1;
    if (row >= p.places.after) {
        const int number = row - p.places.after;
        return number < p.after ? p.queries - p.after + number : -1;
    }
    const int line = (row - p.places.video) / p.places.line;
    int column = (row - p.places.video) % p.places.line;
    if (p.places.step > 1) column = column % p.places.class_width * p.places.step + column / p.places.class_width;
    return column < p.width ? p.before + line * p.width + column : -1;
}

template <typename Pair>
__device__ __forceinline__ float product(uint4 a, uint4 b) {
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        Pair x, y;
        memcpy(&x, left + i, 4), memcpy(&y, right + i, 4);
        sum = fmaf(static_cast<float>(x.x), static_cast<float>(y.x), sum);
        sum = fmaf(static_cast<float>(x.y), static_cast<float>(y.y), sum);
    }
    return sum;
}

// LANES: threads of a row, each with eight columns.
template <typename Pair, int LANES>
__global__ void __launch_bounds__(THREADS) prepare(const __grid_constant__ Parameters p) {
    using Element = decltype(Pair::x);
    constexpr int AT_ONCE = THREADS / LANES;  // rows
    const int head = blockIdx.x % p.heads;
    const int chunk = blockIdx.x / p.heads % p.chunks;
    const int64_t batch = blockIdx.x / p.heads / p.chunks;
    // Threads of columns that the tensors do not have read others, and add nothing.
    const int column = threadIdx.x % LANES * 8;
    const bool real = column < p.head_dim;
    const int64_t offset = real ? column : 0;
    const auto* out = static_cast<const Element*>(p.out) + batch * p.out_batch + head * p.out_head + offset;
    const auto* dout = static_cast<const Element*>(p.dout) + batch * p.dout_batch + head * p.dout_head + offset;

    __shared__ int tokens[ROWS];  // of padding, any
    __shared__ float sums[ROWS];
    const int own = chunk * ROWS + threadIdx.x;
    const bool writes = threadIdx.x < ROWS && own < p.places.rows;
    const int token = writes ? token_at(p, own) : -1;
    float lse = 0.0f, dlse = 0.0f;
    if (threadIdx.x < ROWS) tokens[threadIdx.x] = max(token, 0);
    if (token >= 0) {
        const int64_t at = (batch * p.heads + head) * p.queries + token;
        lse = __ldg(p.lse + at);
        if (p.dlse) dlse = __ldg(p.dlse + at);
    }
    __syncthreads();

    uint4 left[ROWS / AT_ONCE], right[ROWS / AT_ONCE];
#pragma unroll
    for (int i = 0; i < ROWS / AT_ONCE; ++i) {
        const int64_t row = tokens[i * AT_ONCE + threadIdx.x / LANES];
        left[i] = __ldcs(reinterpret_cast<const uint4*>(out + row * p.out_token));
        right[i] = __ldg(reinterpret_cast<const uint4*>(dout + row * p.dout_token));
    }
#pragma unroll
    for (int i = 0; i < ROWS / AT_ONCE; ++i) {
        float sum = real ? product<Pair>(left[i], right[i]) : 0.0f;
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, step);
        if (threadIdx.x % LANES == 0) sums[i * AT_ONCE + threadIdx.x / LANES] = sum;
    }
    __syncthreads();
    if (!writes) return;
    float* to = p.stats + (batch * p.heads + head) * p.places.rows + own;
    to[0] = lse == -INFINITY ? INFINITY : lse * 1.4426950408889634f;
    to[p.of_delta] = token >= 0 ? sums[threadIdx.x] - dlse : 0.0f;
}

template <typename Pair>
void launch(const Parameters& p, unsigned blocks, cudaStream_t stream) {
    if (p.head_dim > 64)
        prepare<Pair, 16><<<blocks, THREADS, 0, stream>>>(p);
    else
        prepare<Pair, 8><<<blocks, THREADS, 0, stream>>>(p);
}

}  // namespace

cudaError_t attention_backward_prepare(const AttentionPrepare& call, cudaStream_t stream) {
    if (call.batch == 0 || call.queries == 0) return cudaSuccess;
    if (call.stats.rows() > INT32_MAX) return cudaErrorInvalidValue;
    Parameters p{};
    p.out = call.out.data, p.dout = call.dout.data;
    p.out_batch = call.out.batch, p.out_token = call.out.token, p.out_head = call.out.head;
    p.dout_batch = call.dout.batch, p.dout_token = call.dout.token, p.dout_head = call.dout.head;
    p.lse = call.lse, p.dlse = call.dlse;
    p.stats = call.stats.data;
    p.places = attention_bwd::StatsPlaces(call.stats);
    p.of_delta = call.stats.rows() * call.batch * call.heads;
    p.before = call.stats.before, p.after = call.stats.after, p.width = call.stats.shape[2];
    p.heads = call.heads, p.head_dim = call.head_dim, p.queries = call.queries;
    p.chunks = (p.places.rows + ROWS - 1) / ROWS;
    const int64_t blocks = int64_t{p.chunks} * call.heads * call.batch;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (call.bf16)
        launch<__nv_bfloat162>(p, static_cast<unsigned>(blocks), stream);
    else
        launch<__half2>(p, static_cast<unsigned>(blocks), stream);
    return cudaGetLastError();
}

}  // namespace stattn
