// dQ of the attention backward on Hopper, by tiles of queries: the sum over each row's own keys, in a fixed order.
//
//     S = Q K_i^T;  P = 2^(c S - L);  dP = dO V_i^T;  dS = P (dP - delta);  dQ = scale sum_i dS K_i
//
// with c = scale log2(e); L is the LSE to base 2 and delta = rowsum(dO O) - dLSE, both prepared (AttentionStats). Tiles,
// boxes of keys, masks and plans are those of the forward (attention_tile.cuh). dS is rounded to the elements' type for
// its product with K, dQ once at the end.
//
// A producer warpgroup brings K and V through two rings. A consumer warpgroup finds S of its box computed; it runs the
// exponentials while dP is computed, and issues S of the next box together with dQ of this one. Warpgroups keep no step.
#pragma once

#include "attention_bwd.h"
#include "attention_products.cuh"
#include "attention_tile.cuh"

namespace stattn::attention_bwd {

using namespace sm90;
using attention_fwd::BoxMask;
using attention_fwd::Corner;
using attention_fwd::corner_of;
using attention_fwd::first_row;
using attention_fwd::Heads;
using attention_fwd::issue_square;
using attention_fwd::issue_weighted;
using attention_fwd::record_at;
using attention_fwd::ROWS;
using attention_fwd::Tile;
using attention_fwd::tile_at;

// The forward's parameters, with dQ in the place of the output, and the LSE unused.
struct DqParameters : attention_fwd::Parameters {
    CUtensorMap dout_map, dout_line[2];
    Heads dout_x;
    const float* stats;
    int64_t of_delta;  // from a row's LSE to its delta
    StatsPlaces places;
    Together together;
    float scale;
};

template <typename Element_, int D_, int WARPGROUPS_, int BN_, int STAGES_>
struct DqShape {
    using Element = Element_;
    static constexpr bool PLANNED = true;
    static constexpr int D = D_;
    static constexpr int WARPGROUPS = WARPGROUPS_;  // consumers
    static constexpr int BN = BN_;                  // rows of a key box
    static constexpr int THREADS = 128 * (WARPGROUPS + 1);
    static constexpr int CHUNKS = D / 64;
    static constexpr uint32_t SLAB_CHUNK = ROWS * 128;
    static constexpr uint32_t SLAB = CHUNKS * SLAB_CHUNK;
    static constexpr uint32_t BOX_CHUNK = BN * 128;
    static constexpr uint32_t BOX = CHUNKS * BOX_CHUNK;
    static constexpr int STAGES = STAGES_;  // of both rings, a power of 2
    static constexpr uint32_t Q_AT = 0;
    static constexpr uint32_t DO_AT = Q_AT + WARPGROUPS * SLAB;
    static constexpr uint32_t K_AT = DO_AT + WARPGROUPS * SLAB;
    static constexpr uint32_t V_AT = K_AT + STAGES * BOX;
    static constexpr uint32_t BARRIERS_AT = V_AT + STAGES * BOX;
    static constexpr uint32_t VALID = 8 * (4 * STAGES + WARPGROUPS);  // behind the barriers: which global keys are real
    static constexpr uint32_t SHARED = BARRIERS_AT + VALID;
    static constexpr uint32_t LAUNCHED = SHARED + 1024;  // room to align the start; without what depends on the call
    static constexpr int CONSUMER_REGISTERS = WARPGROUPS == 2 ? 240 : 160;
    static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 ? 24 : 32;
    static_assert(D % 64 == 0 && BN % 16 == 0 && BOX_CHUNK % 1024 == 0 && (STAGES & (STAGES - 1)) == 0);
    static_assert(LAUNCHED <= 232448);

    __device__ static uint32_t full_k(uint32_t base, int stage) { return base + 8 * stage; }
    __device__ static uint32_t empty_k(uint32_t base, int stage) { return base + 8 * (STAGES + stage); }
    __device__ static uint32_t full_v(uint32_t base, int stage) { return base + 8 * (2 * STAGES + stage); }
    __device__ static uint32_t empty_v(uint32_t base, int stage) { return base + 8 * (3 * STAGES + stage); }
    __device__ static uint32_t full_q(uint32_t base, int group) { return base + 8 * (4 * STAGES + group); }
};

// A stage of a ring and the parity of its present use.
template <typename S>
struct Turn {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        stage = (stage + 1) % S::STAGES;
        parity ^= stage == 0;
    }
};

// The producer.

template <typename S>
struct BoxLoader {
    const DqParameters& p;
    uint32_t shared, barriers;
    Turn<S> turn;
    int k_x, v_x;  // of the tile's head

    __device__ __forceinline__ void start(const Tile& tile) {
        const int head = tile.head / p.queries_per_key;
        k_x = tile.batch * p.k_x.batch + head * p.k_x.head;
        v_x = tile.batch * p.v_x.batch + head * p.v_x.head;
    }

    // in_line: the box is one of the line of all tokens.
    __device__ __forceinline__ void visit(int t, int h, int w, int in_line) {
        barrier_wait(S::empty_k(barriers, turn.stage), turn.parity ^ 1);
        load(S::K_AT, in_line ? &p.k_line : &p.k_map, S::full_k(barriers, turn.stage), t, h, w, k_x);
        barrier_wait(S::empty_v(barriers, turn.stage), turn.parity ^ 1);
        load(S::V_AT, in_line ? &p.v_line : &p.v_map, S::full_v(barriers, turn.stage), t, h, w, v_x);
        turn.advance();
    }

    __device__ __forceinline__ void load(uint32_t ring, const CUtensorMap* map, uint32_t full, int t, int h, int w, int x) {
        barrier_expect(full, p.box_bytes);
#pragma unroll
        for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
            copy_in(shared + ring + turn.stage * S::BOX + chunk * S::BOX_CHUNK, map, full, EVICT_LAST, 64 * chunk, w, h, t,
                    x);
    }
};

template <typename S>
__device__ __forceinline__ void produce_boxes(const DqParameters& p, uint32_t shared, uint32_t barriers) {
    BoxLoader<S> loader{p, shared, barriers};
    const Tile tile = tile_at<S>(p, blockIdx.x);
    loader.start(tile);
    p.together.begin(tile.boxes);
    for (int number = 0; number < tile.boxes; ++number) {
        const int4 box = record_at(p, tile.first_box + number);
        loader.visit(box.x, box.y, box.z, box.w);
    }
    p.together.end(Together::GROUPS);
}

// Brings Q and dO.
template <typename S>
__device__ __forceinline__ void produce_rows(const DqParameters& p, uint32_t shared, uint32_t barriers) {
    const Tile tile = tile_at<S>(p, blockIdx.x);
    const bool line = tile.kind != attention_fwd::VIDEO;
    const CUtensorMap* q = line ? &p.q_line[tile.kind - attention_fwd::BEFORE] : &p.q_map;
    const CUtensorMap* dout = line ? &p.dout_line[tile.kind - attention_fwd::BEFORE] : &p.dout_map;
    const int q_x = tile.batch * p.q_x.batch + tile.head * p.q_x.head;
    const int dout_x = tile.batch * p.dout_x.batch + tile.head * p.dout_x.head;
    for (int group = 0; group < S::WARPGROUPS; ++group) {
        const uint32_t full = S::full_q(barriers, group);
        barrier_expect(full, 2 * (line ? S::SLAB : p.slab_bytes));
        const Corner corner = corner_of<S>(p, tile, group);
#pragma unroll
        for (int chunk = 0; chunk < S::CHUNKS; ++chunk) {
            const uint32_t to = shared + group * S::SLAB + chunk * S::SLAB_CHUNK;
            copy_in(to + S::Q_AT, q, full, EVICT_FIRST, 64 * chunk, corner.w, corner.h, corner.t, q_x);
            copy_in(to + S::DO_AT, dout, full, EVICT_FIRST, 64 * chunk, corner.w, corner.h, corner.t, dout_x);
        }
    }
}

// The consumers.

__device__ __forceinline__ uint32_t store_barrier(int group) { return 1 + group; }

// The stats of a thread's two rows, `first_row()` and eight behind.
struct RowStats {
    float lse[2], delta[2];

    template <typename S>
    __device__ __forceinline__ void load(const DqParameters& p, const Tile& tile, int group) {
        const Corner corner = corner_of<S>(p, tile, group);
        const float* stats = p.stats + (int64_t{tile.batch} * p.heads + tile.head) * p.places.rows;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row() + 8 * half;
            int at = -1;
            if (tile.kind != attention_fwd::VIDEO) {
                const int number = corner.w + row;
                const bool before = tile.kind == attention_fwd::BEFORE;
                if (number < (before ? p.before : p.after)) at = (before ? 0 : p.places.after) + number;
            } else {
                const int plane = p.slab[1] * p.slab[2];
                const int t = corner.t + row / plane * p.steps[0];
                const int h = corner.h + row / p.slab[2] % p.slab[1] * p.steps[1];
                const int w = corner.w + row % p.slab[2] * p.steps[2];
                if (row < p.slab_rows && t < p.q_shape[0] && h < p.q_shape[1] && w < p.q_shape[2])
                    at = p.places.at(t, h, w);
            }
            // A row that is none weighs nothing, whatever lies in its place.
            lse[half] = at < 0 ? INFINITY : __ldg(stats + at);
            delta[half] = at < 0 ? 0.0f : __ldg(stats + at + p.of_delta);
        }
    }
};

// Stores the gradient of a warpgroup from its own rows of Q.
template <typename S>
__device__ __forceinline__ void store_gradient(const DqParameters& p, const Tile& tile, float (&gradient)[S::D / 2],
                                               uint32_t slab, int group) {
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const uint32_t address = slab + row * 128;
#pragma unroll
    for (int step = 0; step < S::D / 16; ++step) {
        const float* g = gradient + 8 * step;
        const int column = step % 4 * 2 + lane / 16;  // in words of 16 bytes
        store_matrices(address + step / 4 * S::SLAB_CHUNK + ((column ^ (row % 8)) * 16),
                       pack<typename S::Element>(g[0] * p.scale, g[1] * p.scale),
                       pack<typename S::Element>(g[2] * p.scale, g[3] * p.scale),
                       pack<typename S::Element>(g[4] * p.scale, g[5] * p.scale),
                       pack<typename S::Element>(g[6] * p.scale, g[7] * p.scale));
    }
    proxy_fence();
    named_sync(store_barrier(group), 128);
    if (threadIdx.x % 128 == 0) {
        const bool line = tile.kind != attention_fwd::VIDEO;
        const Corner corner = corner_of<S>(p, tile, group);
        const int x = tile.batch * p.o_x.batch + tile.head * p.o_x.head;
        const CUtensorMap* map = line ? &p.o_line[tile.kind - attention_fwd::BEFORE] : &p.o_map;
#pragma unroll
        for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
            copy_out(map, slab + chunk * S::SLAB_CHUNK, EVICT_FIRST, 64 * chunk, corner.w, corner.h, corner.t, x);
        copy_out_commit();
        copy_out_wait_read();
    }
}

// What a warpgroup computes with; descriptors are those of the first stage.
template <typename S>
struct Consumer {
    const DqParameters& p;
    uint32_t barriers;
    uint64_t q, dout, k, v, k_rows;  // k_rows: K as the right operand of dS K
    int group;
    bool elected;  // one thread of each warp
    Turn<S> turn;

    // Lets boxes pass that none of the warpgroup's rows sees, from `number` on; returns the next that one does.
    // first_mask: the warpgroup's first mask record. record: becomes that of the box.
    __device__ __forceinline__ int next_seen(int number, int masked, int first_mask, int4& record) {
        for (; number < masked; ++number) {
            record = record_at(p, first_mask + number);
            if (record.w >= 0) break;
            barrier_wait(S::full_k(barriers, turn.stage), turn.parity);
            if (elected) barrier_arrive(S::empty_k(barriers, turn.stage));
            barrier_wait(S::full_v(barriers, turn.stage), turn.parity);
            if (elected) barrier_arrive(S::empty_v(barriers, turn.stage));
            turn.advance();
        }
        return number;
    }

    __device__ __forceinline__ void begin(float (&scores)[S::BN / 2]) {
        barrier_wait(S::full_k(barriers, turn.stage), turn.parity);
        issue_square<S>(scores, q, k + turn.stage * (S::BOX / 16));
        mma_wait<0>();
        pin(scores);
    }

    // One box, whose scores are computed; then those of the next box that is seen, if there is one. Returns its number.
    template <bool MASKED>
    __device__ __forceinline__ int step(float (&scores)[S::BN / 2], float (&gradient)[S::D / 2], const RowStats& rows,
                                        int number, int boxes, int masked, int first_mask, int4& record) {
        const Turn<S> mine = turn;
        float dp[S::BN / 2];
        uint32_t ds[S::BN / 16][4];
        barrier_wait(S::full_v(barriers, mine.stage), mine.parity);
        issue_square<S>(dp, dout, v + mine.stage * (S::BOX / 16));
        if constexpr (MASKED) {
            BoxMask<S> mask;
            mask.load(p, barriers, record);
            mask.apply(scores);
        }
#pragma unroll
        for (int i = 0; i < S::BN / 2; ++i)
            scores[i] = exp2_approx(fmaf(scores[i], p.scale_log2, -rows.lse[i / 2 % 2]));
        mma_wait<0>();
        pin(dp);
        if (elected) barrier_arrive(S::empty_v(barriers, mine.stage));
#pragma unroll
        for (int j = 0; j < S::BN / 4; ++j) {
            const float delta = rows.delta[j % 2];
            ds[j / 4][j % 4] = pack<typename S::Element>(scores[2 * j] * (dp[2 * j] - delta),
                                                         scores[2 * j + 1] * (dp[2 * j + 1] - delta));
        }
        turn.advance();
        const uint64_t own = k_rows + mine.stage * (S::BOX / 16);
        ++number;
        bool follows = number < boxes;
        if (MASKED && number < masked) {
            record = record_at(p, first_mask + number);
            follows = record.w >= 0;
        }
        if (follows) {
            barrier_wait(S::full_k(barriers, turn.stage), turn.parity);
            issue_square<S>(scores, q, k + turn.stage * (S::BOX / 16));
            issue_weighted<S>(gradient, ds, own);
            mma_wait<0>();
            pin(scores);
            pin(gradient);
        } else {
            issue_weighted<S>(gradient, ds, own);
            mma_wait<0>();
            pin(gradient);
        }
        // Given back before boxes are left out: one behind the next needs this stage.
        if (elected) barrier_arrive(S::empty_k(barriers, mine.stage));
        if (MASKED && !follows && number < boxes) {
            number = next_seen(number, masked, first_mask, record);
            if (number < boxes) begin(scores);
        }
        return number;
    }
};

template <typename S>
__device__ __forceinline__ void consume(const DqParameters& p, uint32_t shared, uint32_t barriers) {
    // A shuffle tells the compiler that this is the same in the whole warp: descriptors then stay in uniform registers.
    const int group = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128 - 1, 0);
    const uint32_t slab = shared + S::Q_AT + group * S::SLAB;
    Consumer<S> consumer{p,
                         barriers,
                         operand(slab, 16),
                         operand(shared + S::DO_AT + group * S::SLAB, 16),
                         operand(shared + S::K_AT, 16),
                         operand(shared + S::V_AT, 16),
                         operand(shared + S::K_AT, S::BOX_CHUNK),
                         group,
                         threadIdx.x % 32 == 0};
    float scores[S::BN / 2];
    float gradient[S::D / 2];
#pragma unroll
    for (int i = 0; i < S::D / 2; ++i) gradient[i] = 0.0f;
    const Tile tile = tile_at<S>(p, blockIdx.x);
    RowStats rows;
    rows.load<S>(p, tile, group);

    const int boxes = tile.boxes, masked = tile.masked, first_mask = tile.first_mask + group * masked;
    int4 record{};
    barrier_wait(S::full_q(barriers, group), 0);
    int number = consumer.next_seen(0, masked, first_mask, record);
    if (number < boxes) consumer.begin(scores);
#pragma unroll 1
    while (number < masked)
        number = consumer.template step<true>(scores, gradient, rows, number, boxes, masked, first_mask, record);
#pragma unroll 1
    while (number < boxes)
        number = consumer.template step<false>(scores, gradient, rows, number, boxes, masked, first_mask, record);
    store_gradient<S>(p, tile, gradient, slab, group);
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1) attention_dq(const __grid_constant__ DqParameters p) {
    extern __shared__ uint8_t memory[];
    const uint32_t shared = __shfl_sync(0xFFFFFFFF, (shared_address(memory) + 1023) & ~1023u, 0);
    const uint32_t barriers = shared + S::BARRIERS_AT;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::STAGES; ++stage) {
            barrier_init(S::full_k(barriers, stage), 1);
            barrier_init(S::full_v(barriers, stage), 1);
            // One arrival a warp: a thread's wait proves only that its own warp's products are done.
            barrier_init(S::empty_k(barriers, stage), 4 * S::WARPGROUPS);
            barrier_init(S::empty_v(barriers, stage), 4 * S::WARPGROUPS);
        }
        for (int group = 0; group < S::WARPGROUPS; ++group) {
            barrier_init(S::full_q(barriers, group), 1);
        }
        barrier_init_fence();
    }
    if (p.box_rows < S::BN)
        attention_fwd::clear_behind_boxes<S>(p, shared + S::K_AT, 2 * S::STAGES * S::CHUNKS);
    if (p.valid) attention_fwd::note_valid<S>(p, barriers + S::VALID);
    __syncthreads();

    if (threadIdx.x < 128) {
        registers_shrink<S::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce_boxes<S>(p, shared, barriers);
        if (threadIdx.x == 32) produce_rows<S>(p, shared, barriers);
    } else {
        registers_grow<S::CONSUMER_REGISTERS>();
        consume<S>(p, shared, barriers);
    }
}

}  // namespace stattn::attention_bwd
