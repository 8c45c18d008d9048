// Attention forward on Hopper: O = softmax(scale Q K^T) V and its LSE, from tokens where they lie.
//
// A thread block computes query tiles of 64 rows a consumer warpgroup. A producer warpgroup brings boxes of keys and
// values by tensor copies through two rings in shared memory; the consumers run the online softmax
//
//     S = Q K_i^T;  m' = max(m, c max S);  P = 2^(c S - m');  l = l 2^(m - m') + sum P;  O = O 2^(m - m') + P V_i
//
// with c = scale log2(e) in fp32, where the products of one box run under the softmax of the one before it, and the
// warpgroups take turns on the tensor cores. P is rounded to the elements' type for P V, O once at the end. Rows are
// rescaled only when the maximum of one in the warp moved: where it did not, the factor is 1.
//
// Tensors are seen as {D, W, H, T, X}, X the heads of all batches; a tile is a box of that, so a tile may have any
// extents in (t, h, w), may start anywhere and may reach over the edge: what lies outside is 0 and is never written.
#pragma once

#include <cstdint>

#include "attention_fwd.h"
#include "sm90.cuh"

namespace stattn::attention_fwd {

using namespace sm90;

constexpr int STAGES = 2;
constexpr int ROWS = 64;  // of a warpgroup

template <typename Element_, int D_, int WARPGROUPS_, int BN_>
struct Shape {
    using Element = Element_;
    static constexpr int D = D_;                    // columns computed; the tensors may have fewer
    static constexpr int WARPGROUPS = WARPGROUPS_;  // consumers
    static constexpr int BN = BN_;                  // rows of a key box
    static constexpr int THREADS = 128 * (WARPGROUPS + 1);
    static constexpr int CHUNKS = D / 64;
    static constexpr uint32_t SLAB_CHUNK = ROWS * 128;
    static constexpr uint32_t SLAB = CHUNKS * SLAB_CHUNK;
    static constexpr uint32_t BOX_CHUNK = BN * 128;
    static constexpr uint32_t BOX = CHUNKS * BOX_CHUNK;
    static constexpr uint32_t Q_AT = 0;
    static constexpr uint32_t K_AT = Q_AT + WARPGROUPS * SLAB;
    static constexpr uint32_t V_AT = K_AT + STAGES * BOX;
    static constexpr uint32_t BARRIERS_AT = V_AT + STAGES * BOX;
    static constexpr uint32_t SHARED = BARRIERS_AT + 8 * (4 * STAGES + 2 * WARPGROUPS);
    static constexpr uint32_t LAUNCHED = SHARED + 1024;  // room to align the start
    // setmaxnreg shares out what the launch allocated: more would wait for ever.
    static constexpr int CONSUMER_REGISTERS = WARPGROUPS == 2 ? 240 : 160;
    static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 ? 24 : 32;
    static_assert(WARPGROUPS == 2 || WARPGROUPS == 3);
    static_assert(D % 64 == 0 && BN % 16 == 0 && BOX_CHUNK % 1024 == 0);
    static_assert(LAUNCHED <= 232448);

    // Addresses of barriers, from that of the first.
    __device__ static uint32_t full_k(uint32_t base, int stage) { return base + 8 * stage; }
    __device__ static uint32_t empty_k(uint32_t base, int stage) { return base + 8 * (STAGES + stage); }
    __device__ static uint32_t full_v(uint32_t base, int stage) { return base + 8 * (2 * STAGES + stage); }
    __device__ static uint32_t empty_v(uint32_t base, int stage) { return base + 8 * (3 * STAGES + stage); }
    __device__ static uint32_t full_q(uint32_t base, int group) { return base + 8 * (4 * STAGES + group); }
    __device__ static uint32_t empty_q(uint32_t base, int group) { return base + 8 * (4 * STAGES + WARPGROUPS + group); }
};

// A stage of a ring and the parity of its present use.
struct Turn {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        stage ^= 1;
        parity ^= stage == 0;
    }
};
static_assert(STAGES == 2);

// Where a query tile lies.
struct Tile {
    int t, h, w;      // its first row
    int batch, head;  // of the queries
};

__device__ __forceinline__ Tile tile_at(const Parameters& p, int index) {
    Tile tile;
    int rest = index;
    tile.w = rest % p.q_tiles[2] * p.q_tile[2];
    rest /= p.q_tiles[2];
    tile.h = rest % p.q_tiles[1] * p.q_tile[1];
    rest /= p.q_tiles[1];
    tile.t = rest % p.q_tiles[0] * p.q_tile[0];
    rest /= p.q_tiles[0];
    tile.head = rest % p.heads;
    tile.batch = rest / p.heads;
    return tile;
}

// The place of box `number` of a line of `boxes`: a last box that is not whole comes first, so that only the first one
// has keys to be masked.
template <int BN>
__device__ __forceinline__ int line_start(int number, int boxes, bool ragged) {
    return (ragged ? (number == 0 ? boxes - 1 : number - 1) : number) * BN;
}

template <typename S>
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, uint32_t full, uint32_t bytes, int t, int h,
                                         int w, int x) {
    barrier_expect(full, bytes);
#pragma unroll
    for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
        copy_in(to + chunk * S::BOX_CHUNK, map, full, EVICT_LAST, 64 * chunk, w, h, t, x);
}

// Brings the boxes of keys and values. K runs one box ahead of V, as the consumers do.
template <typename S>
__device__ __forceinline__ void produce_keys(const Parameters& p, uint32_t shared, uint32_t barriers) {
    const int boxes = p.boxes;
    const bool ragged = p.keys % S::BN != 0;
    Turn k_turn, v_turn;
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const Tile tile = tile_at(p, index);
        const int head = tile.head / p.queries_per_key;
        const int k_x = tile.batch * p.k_x.batch + head * p.k_x.head;
        const int v_x = tile.batch * p.v_x.batch + head * p.v_x.head;
        for (int number = 0; number <= boxes; ++number) {
            if (number < boxes) {
                barrier_wait(S::empty_k(barriers, k_turn.stage), k_turn.parity ^ 1);
                load_box<S>(shared + S::K_AT + k_turn.stage * S::BOX, &p.k_map, S::full_k(barriers, k_turn.stage),
                            p.box_bytes, 0, 0, line_start<S::BN>(number, boxes, ragged), k_x);
                k_turn.advance();
            }
            if (number > 0) {
                barrier_wait(S::empty_v(barriers, v_turn.stage), v_turn.parity ^ 1);
                load_box<S>(shared + S::V_AT + v_turn.stage * S::BOX, &p.v_map, S::full_v(barriers, v_turn.stage),
                            p.box_bytes, 0, 0, line_start<S::BN>(number - 1, boxes, ragged), v_x);
                v_turn.advance();
            }
        }
    }
}

// Brings the queries, each warpgroup's rows as soon as it has stored the output of its last tile from there.
template <typename S>
__device__ __forceinline__ void produce_queries(const Parameters& p, uint32_t shared, uint32_t barriers) {
    uint32_t parity = 0;
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const Tile tile = tile_at(p, index);
        const int x = tile.batch * p.q_x.batch + tile.head * p.q_x.head;
        for (int group = 0; group < S::WARPGROUPS; ++group) {
            barrier_wait(S::empty_q(barriers, group), parity ^ 1);
            barrier_expect(S::full_q(barriers, group), p.slab_bytes);
#pragma unroll
            for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
                copy_in(shared + S::Q_AT + group * S::SLAB + chunk * S::SLAB_CHUNK, &p.q_map,
                        S::full_q(barriers, group), EVICT_FIRST, 64 * chunk, tile.w + group * p.slab_step[2],
                        tile.h + group * p.slab_step[1], tile.t + group * p.slab_step[0], x);
        }
        parity ^= 1;
    }
}

// Names of barriers: 0 is that of the whole block.
__device__ __forceinline__ uint32_t turn_barrier(int group) { return 1 + group; }
__device__ __forceinline__ uint32_t store_barrier(int group) { return 4 + group; }

// The state of a thread's two rows, `row` and `row + 8` of its warpgroup.
struct Rows {
    float top[2];  // c times the greatest score so far, over the row
    float sum[2];  // of the weights so far, over this thread's columns
};

// S = Q K^T, not waited for. Operands are given for their first 16 columns.
template <typename S>
__device__ __forceinline__ void issue_scores(float (&scores)[S::BN / 2], uint64_t q, uint64_t k) {
    using Mma = Wgmma<typename S::Element, S::BN>;
    mma_fence();
#pragma unroll
    for (int step = 0; step < S::D / 16; ++step) {
        const uint64_t q_step = q + (step / 4 * S::SLAB_CHUNK + step % 4 * 32) / 16;
        const uint64_t k_step = k + (step / 4 * S::BOX_CHUNK + step % 4 * 32) / 16;
        if (step == 0)
            Mma::first(scores, q_step, k_step);
        else
            Mma::next(scores, q_step, k_step);
    }
    mma_commit();
}

// O += P V, not waited for.
template <typename S>
__device__ __forceinline__ void issue_output(float (&out)[S::D / 2], const uint32_t (&weights)[S::BN / 16][4],
                                             uint64_t v) {
    mma_fence();
#pragma unroll
    for (int step = 0; step < S::BN / 16; ++step)
        Wgmma<typename S::Element, S::D>::next(out, weights[step], v + step * 2048 / 16);
    mma_commit();
}

// The greatest of a row of scores, over the four threads that share it.
template <int COUNT>
__device__ __forceinline__ float row_max(const float (&scores)[COUNT], int half) {
    float best[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) best[i] = scores[i % 2 + 4 * (i / 2) + 2 * half];
#pragma unroll
    for (int j = 2; j < COUNT / 4; ++j) {
        best[j % 2 * 2] = fmaxf(best[j % 2 * 2], scores[4 * j + 2 * half]);
        best[j % 2 * 2 + 1] = fmaxf(best[j % 2 * 2 + 1], scores[4 * j + 2 * half + 1]);
    }
    float most = fmaxf(fmaxf(best[0], best[1]), fmaxf(best[2], best[3]));
    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, 1));
    return fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, 2));
}

// Turns scores into weights against the rows' new greatest scores. The weights' sum is added to the rows'.
// MASKED: a row may have no score but -inf.
template <bool MASKED, typename Element, int COUNT>
__device__ __forceinline__ void weigh(float (&scores)[COUNT], uint32_t (&weights)[COUNT / 8][4], Rows& rows,
                                      const float (&top)[2], const float (&factor)[2], float c) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float origin = MASKED && top[half] == -INFINITY ? 0.0f : top[half];
        float sum[2] = {};
#pragma unroll
        for (int j = 0; j < COUNT / 4; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& s = scores[4 * j + 2 * half + i];
                s = exp2_approx(fmaf(s, c, -origin));
                sum[i] += s;
            }
            weights[j / 2][j % 2 * 2 + half] = pack<Element>(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]);
        }
        rows.sum[half] = fmaf(rows.sum[half], factor[half], sum[0] + sum[1]);
        rows.top[half] = top[half];
    }
}

// Sets the scores of columns from `limit` on to -inf.
template <int COUNT>
__device__ __forceinline__ void mask_end(float (&scores)[COUNT], int limit) {
    const int mine = limit - threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < COUNT / 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (8 * j + i % 2 >= mine) scores[4 * j + i] = -INFINITY;
}

// Divides by the sums, stores the output tile from the warpgroup's own rows of Q, and the LSE.
template <typename S>
__device__ __forceinline__ void store(const Parameters& p, const Tile& tile, float (&out)[S::D / 2], const Rows& rows,
                                      uint32_t slab, uint32_t empty_q, int group) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
    float inverse[2], lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = rows.sum[half];
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
        inverse[half] = sum > 0.0f ? 1.0f / sum : 0.0f;
        lse[half] = sum > 0.0f ? (rows.top[half] + log2f(sum)) * 0.6931471805599453f : -INFINITY;
    }

    // Matrices of a store: rows 0-7 and 8-15 of 8 columns, then of the next 8.
    const int row = warp * 16 + lane % 16;
    const uint32_t address = slab + row * 128;
#pragma unroll
    for (int step = 0; step < S::D / 16; ++step) {
        const float* o = out + 8 * step;
        const int column = step % 4 * 2 + lane / 16;  // in words of 16 bytes
        store_matrices(address + step / 4 * S::SLAB_CHUNK + ((column ^ (row % 8)) * 16),
                       pack<typename S::Element>(o[0] * inverse[0], o[1] * inverse[0]),
                       pack<typename S::Element>(o[2] * inverse[1], o[3] * inverse[1]),
                       pack<typename S::Element>(o[4] * inverse[0], o[5] * inverse[0]),
                       pack<typename S::Element>(o[6] * inverse[1], o[7] * inverse[1]));
    }
    proxy_fence();
    named_sync(store_barrier(group), 128);
    const int t = tile.t + group * p.slab_step[0], h = tile.h + group * p.slab_step[1];
    const int w = tile.w + group * p.slab_step[2];
    if (threadIdx.x % 128 == 0) {
        const int x = tile.batch * p.o_x.batch + tile.head * p.o_x.head;
#pragma unroll
        for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
            copy_out(&p.o_map, slab + chunk * S::SLAB_CHUNK, EVICT_FIRST, 64 * chunk, w, h, t, x);
        copy_out_commit();
        copy_out_wait_read();
        barrier_arrive(empty_q);
    }

    if (lane % 4 == 0) {
        const int plane = p.slab[1] * p.slab[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = warp * 16 + lane / 4 + 8 * half;
            const int rt = t + r / plane, rh = h + r % plane / p.slab[2], rw = w + r % p.slab[2];
            if (r < plane * p.slab[0] && rt < p.q_shape[0] && rh < p.q_shape[1] && rw < p.q_shape[2]) {
                const int64_t line = int64_t{tile.batch} * p.heads + tile.head;
                p.lse[line * p.queries + (rt * p.q_shape[1] + rh) * p.q_shape[2] + rw] = lse[half];
            }
        }
    }
}

template <typename S>
__device__ __forceinline__ void consume(const Parameters& p, uint32_t shared, uint32_t barriers) {
    // A shuffle tells the compiler that these are the same in the whole warp: descriptors then stay in uniform registers.
    const int group = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128 - 1, 0);
    const bool elected = threadIdx.x % 32 == 0;
    const uint32_t slab = shared + S::Q_AT + group * S::SLAB;
    const uint64_t q = operand(slab, 16);
    const uint64_t k_first = operand(shared + S::K_AT, 16);
    const uint64_t v_first = operand(shared + S::V_AT, S::BOX_CHUNK);
    const float c = p.scale_log2;
    const int boxes = p.boxes;
    const int ragged = p.keys % S::BN;

    Turn turn;
    uint32_t q_parity = 0;
    if (group == S::WARPGROUPS - 1) named_arrive(turn_barrier(0), 256);
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        float scores[S::BN / 2];
        float out[S::D / 2];
        uint32_t weights[S::BN / 16][4];
        Rows rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};

        barrier_wait(S::full_q(barriers, group), q_parity);
        q_parity ^= 1;
        barrier_wait(S::full_k(barriers, turn.stage), turn.parity);
        issue_scores<S>(scores, q, k_first + turn.stage * (S::BOX / 16));
        mma_wait<0>();
        pin(scores);
        if (elected) barrier_arrive(S::empty_k(barriers, turn.stage));
        if (ragged) mask_end(scores, ragged);
        {
            float top[2], factor[2] = {1.0f, 1.0f};
#pragma unroll
            for (int half = 0; half < 2; ++half) top[half] = row_max(scores, half) * c;
            weigh<true, typename S::Element>(scores, weights, rows, top, factor, c);
        }
#pragma unroll
        for (int i = 0; i < S::D / 2; ++i) out[i] = 0.0f;

#pragma unroll 1
        for (int number = 1; number < boxes; ++number) {
            const Turn v_turn = turn;
            turn.advance();
            barrier_wait(S::full_k(barriers, turn.stage), turn.parity);
            barrier_wait(S::full_v(barriers, v_turn.stage), v_turn.parity);
            named_sync(turn_barrier(group), 256);
            issue_scores<S>(scores, q, k_first + turn.stage * (S::BOX / 16));
            issue_output<S>(out, weights, v_first + v_turn.stage * (S::BOX / 16));
            named_arrive(turn_barrier(group == S::WARPGROUPS - 1 ? 0 : group + 1), 256);
            mma_wait<1>();
            pin(scores);
            if (elected) barrier_arrive(S::empty_k(barriers, turn.stage));

            float top[2], factor[2];
            bool moved = false;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                top[half] = fmaxf(rows.top[half], row_max(scores, half) * c);
                factor[half] = exp2_approx(rows.top[half] - top[half]);
                moved |= top[half] != rows.top[half];
            }
            mma_wait<0>();
            pin(out);
            if (elected) barrier_arrive(S::empty_v(barriers, v_turn.stage));
            weigh<false, typename S::Element>(scores, weights, rows, top, factor, c);
            if (__any_sync(0xFFFFFFFF, moved)) {
#pragma unroll
                for (int i = 0; i < S::D / 2; ++i) out[i] *= factor[i / 2 % 2];
            }
        }

        barrier_wait(S::full_v(barriers, turn.stage), turn.parity);
        issue_output<S>(out, weights, v_first + turn.stage * (S::BOX / 16));
        mma_wait<0>();
        pin(out);
        if (elected) barrier_arrive(S::empty_v(barriers, turn.stage));
        turn.advance();
        store<S>(p, tile_at(p, index), out, rows, slab, S::empty_q(barriers, group), group);
    }
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1) attention_forward(const __grid_constant__ Parameters p) {
    extern __shared__ uint8_t memory[];
    const uint32_t shared = __shfl_sync(0xFFFFFFFF, (shared_address(memory) + 1023) & ~1023u, 0);
    const uint32_t barriers = shared + S::BARRIERS_AT;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(S::full_k(barriers, stage), 1);
            barrier_init(S::full_v(barriers, stage), 1);
            // One arrival a warp: a thread's wait proves only that its own warp's products are done.
            barrier_init(S::empty_k(barriers, stage), 4 * S::WARPGROUPS);
            barrier_init(S::empty_v(barriers, stage), 4 * S::WARPGROUPS);
        }
        for (int group = 0; group < S::WARPGROUPS; ++group) {
            barrier_init(S::full_q(barriers, group), 1);
            barrier_init(S::empty_q(barriers, group), 1);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        registers_shrink<S::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce_keys<S>(p, shared, barriers);
        if (threadIdx.x == 32) produce_queries<S>(p, shared, barriers);
    } else {
        registers_grow<S::CONSUMER_REGISTERS>();
        consume<S>(p, shared, barriers);
    }
}

}  // namespace stattn::attention_fwd
