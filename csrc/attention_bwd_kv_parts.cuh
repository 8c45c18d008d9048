// What the consumers of attention_bwd_kv.cuh do with a box, in parts.
#pragma once

#include "attention_bwd_kv_tile.cuh"

namespace stattn::attention_bwd {

// S^T = K Q^T or dP^T = V dO^T, not waited for.
template <typename S>
__device__ __forceinline__ void issue_scores(float (&scores)[S::BQ / 2], uint64_t keys, uint64_t queries) {
    using Mma = Wgmma<typename S::Element, S::BQ>;
    mma_fence();
#pragma unroll
    for (int step = 0; step < S::D / 16; ++step) {
        const uint64_t a = operand_at(keys, step / 4 * S::TILE_CHUNK + step % 4 * 32);
        const uint64_t b = operand_at(queries, step / 4 * S::BOX_CHUNK + step % 4 * 32);
        if (step == 0)
            Mma::first(scores, a, b);
        else
            Mma::next(scores, a, b);
    }
    mma_commit();
}

// Half of dV += P^T dO or dK += dS^T Q, neither committed nor waited for.
template <typename S, int HALF>
__device__ __forceinline__ void issue_half(float (&gradient)[S::D / 2], const uint32_t (&weights)[S::BQ / 16][4],
                                           uint64_t queries) {
#pragma unroll
    for (int step = HALF * S::BQ / 32; step < (HALF + 1) * S::BQ / 32; ++step)
        Wgmma<typename S::Element, S::D>::next(gradient, weights[step], operand_at(queries, step * 2048));
}

// The warpgroup's part of dQ = dS K, not waited for.
template <typename S>
__device__ __forceinline__ void issue_dq(float (&dq)[32], uint64_t ds, uint64_t keys) {
    using Mma = Wgmma<typename S::Element, 64>;
    mma_fence();
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
        if (step == 0)
            Mma::first_transposed(dq, ds, keys);
        else
            Mma::next_transposed(dq, operand_at(ds, step * 2048), operand_at(keys, step * 2048));
    }
    mma_commit();
}

__device__ __forceinline__ void load_pair(float& first, float& second, uint32_t from) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(first), "=f"(second) : "r"(from));
}

template <typename S, int HALF>
__device__ __forceinline__ void pack_half(uint32_t (&packed)[S::BQ / 16][4], const float (&values)[S::BQ / 2]) {
#pragma unroll
    for (int i = HALF * S::BQ / 8; i < (HALF + 1) * S::BQ / 8; ++i)
        packed[i / 4][i % 4] = pack<typename S::Element>(values[2 * i], values[2 * i + 1]);
}

// Gives a ring's place back for a warp, all of whose lanes have read it.
__device__ __forceinline__ void give_back(uint32_t empty, bool elected) {
    __syncwarp();
    if (elected) barrier_arrive(empty);
}

// Where a warpgroup finds what it works on; descriptors are those of the first stage.
struct KvOperands {
    uint64_t k, v, q, dout, ds, k_part;
    uint32_t stats;      // of this thread's columns
    uint32_t ds_to;      // where this lane's row of a store of dS^T lies, in the first buffer
    uint32_t ds_real;    // all bits, or none if the row is no key
    uint32_t staged;     // the warp's part of dQ: 4 KB for boxes, or 16 rows of each half of a warpgroup's part
    uint32_t masks;      // of this thread's first row
    uint32_t notes;
    uint32_t barriers;
    int group, warp;
    bool elected;  // one thread of each warp
    float c;
};

// Where this lane's row of a store of the box's dS^T lies: 16 queries a step. Boxes take turns with two buffers.
template <typename S>
__device__ __forceinline__ uint32_t ds_place(const KvOperands& at, int number, int step) {
    return (at.ds_to ^ step % 4 * 32) + (((number & 1) * S::DS + step / 4 * S::DS_CHUNK) & at.ds_real);
}

// One half of dS^T = P^T (dP^T - delta), rounded.
template <typename S, int HALF>
__device__ __forceinline__ void weigh_half(const float (&weights)[S::BQ / 2], const float (&dp)[S::BQ / 2],
                                           uint32_t (&ds)[S::BQ / 16][4], uint32_t deltas, const KvOperands& at,
                                           int number) {
#pragma unroll
    for (int j = HALF * S::BQ / 16; j < (HALF + 1) * S::BQ / 16; ++j) {
        float delta[2];
        load_pair(delta[0], delta[1], deltas + j * 32);
        const float *p = weights + 4 * j, *g = dp + 4 * j;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float low = p[2 * row] * (g[2 * row] - delta[0]), high = p[2 * row + 1] * (g[2 * row + 1] - delta[1]);
            ds[j / 2][j % 2 * 2 + row] = pack<typename S::Element>(low, high);
        }
    }
    if constexpr (S::FUSED) {
#pragma unroll
        for (int step = HALF * S::BQ / 32; step < (HALF + 1) * S::BQ / 32; ++step)
            store_matrices(ds_place<S>(at, number, step), ds[step][0], ds[step][1], ds[step][2], ds[step][3]);
    }
}

// The first query of a box and 4 * (batch * heads + head) + its part, which the producer wrote down.
template <typename S>
__device__ __forceinline__ void load_note(const KvOperands& at, int number, int& t, int& h, int& w, int& x) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(t), "=r"(h), "=r"(w), "=r"(x)
                 : "r"(at.notes + number % S::NOTES * S::NOTE));
}

// n / d for by = ceil(2^32 / d), or 0 for d = 1, and n below 2^26.
__device__ __forceinline__ int divided(int n, uint32_t by) { return by ? __umulhi(n, by) : n; }

// Takes the warpgroup's part of dQ to shared memory, and from there to the sums.
template <typename S>
__device__ __forceinline__ void add_dq(const KvParameters& p, const KvOperands& at, const float (&dq)[32], int number) {
    const int lane = threadIdx.x % 32;
    const bool by_warp = p.by_warp;
    // For head dimension 64 the second warpgroup has the second 64 queries of the box, else the second 64 columns.
    const int sixteen = at.warp + (S::D == 64 ? 4 * at.group : 0);
    const int column = S::D == 64 ? 0 : 64 * at.group;
    if (!S::PLANNED || p.in_boxes) {
        if (S::PLANNED && sixteen * 16 >= p.box_rows) return;
        const int staging = number % S::STAGINGS;
        if constexpr (S::IN_ORDER)
            barrier_wait(S::empty_dq(at.barriers, at.group, staging), (number / S::STAGINGS & 1) ^ 1);
        else if (at.elected)
            copy_out_wait_read();
        __syncwarp();
        const uint32_t to = at.staged + staging * S::STAGED + lane * 16;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + j * 512), "f"(dq[4 * j]),
                         "f"(dq[4 * j + 1]), "f"(dq[4 * j + 2]), "f"(dq[4 * j + 3])
                         : "memory");
        proxy_fence();
        __syncwarp();
        if constexpr (S::IN_ORDER) {
            if (at.elected) barrier_arrive(S::full_dq(at.barriers, at.group, staging));
        } else if (at.elected) {
            int t, h, w, x;
            load_note<S>(at, number, t, h, w, x);
            int box = w / S::BQ;
            if constexpr (S::PLANNED) {
                const int part = x & 3;
                box = divided(w, part == VIDEO ? p.by_extent[2] : p.by_rows);
                if (part == VIDEO)
                    box += (divided(t, p.by_extent[0]) * p.boxes_along[1] + divided(h, p.by_extent[1])) * p.boxes_along[2];
                box += p.first_box[part];
            }
            const int64_t place = int64_t{x >> 2} * p.head_boxes + box;
            copy_add_line(p.sums + (place * 8 + 4 * at.group + at.warp) * 1024, at.staged, 4096);
            copy_out_commit();
        }
        return;
    }
    if ((by_warp ? sixteen * 16 : S::D == 64 ? 64 * at.group : 0) >= p.box_rows) return;
    const bool issuing = by_warp ? at.elected : threadIdx.x % 128 == 0;
    if (issuing) copy_out_wait_read();
    if (by_warp)
        __syncwarp();
    else
        named_sync(1 + at.group, 128);
    const uint32_t first = at.staged + lane / 4 * 128 + (lane % 4 * 8 ^ lane / 4 * 16);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const uint32_t to = (first ^ j % 4 * 32) + j / 4 * (64 * 128);
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(dq[4 * j]), "f"(dq[4 * j + 1]) : "memory");
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + 1024), "f"(dq[4 * j + 2]), "f"(dq[4 * j + 3])
                     : "memory");
    }
    proxy_fence();
    if (by_warp)
        __syncwarp();
    else
        named_sync(1 + at.group, 128);
    if (issuing) {
        int t, h, w, x;
        load_note<S>(at, number, t, h, w, x);
        const int part = x & 3;
        if (by_warp && part != VIDEO) {
            w += 16 * sixteen;
        } else if (by_warp) {
            t += p.warp_place[sixteen][0], h += p.warp_place[sixteen][1], w += p.warp_place[sixteen][2];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
            copy_add(&p.dq[part], at.staged + half * (64 * 128), column + 32 * half, w, h, t, x >> 2);
        copy_out_commit();
    }
}

// The number of the warpgroup's group of masks, or what stands in its place.
template <typename S>
__device__ __forceinline__ int masks_of(const KvOperands& at, int number) {
    int masks;
    const uint32_t from = at.notes + number % S::NOTES * S::NOTE + 16 + 4 * at.group;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(masks) : "r"(from));
    return masks;
}

// A box of which the warpgroup's keys see nothing: dS = 0. The scores of the next box are issued all the same, and the
// warpgroup takes its part in dQ of the box before.
template <typename S>
__device__ __forceinline__ void leave_out(const KvParameters& p, const KvOperands& at, float (&scores)[S::BQ / 2],
                                          int number, int steps) {
    const int stage = number % S::STAGES, parity = number / S::STAGES & 1;
    float dq[32];
    if constexpr (S::FUSED) {
        barrier_wait(S::ready_ds(at.barriers), (number & 1) ^ 1);
#pragma unroll
        for (int step = 0; step < S::BQ / 16; ++step) store_matrices(ds_place<S>(at, number, step), 0, 0, 0, 0);
        proxy_fence();
        issue_dq<S>(dq, operand_at(at.ds, ((number & 1) ^ 1) * S::DS), at.k_part);
    }
    barrier_wait(S::full_do(at.barriers, stage), parity);
    give_back(S::empty_do(at.barriers, stage), at.elected);
    if (number + 1 < steps)
        barrier_wait(S::full_q(at.barriers, (number + 1) % S::STAGES), (number + 1) / S::STAGES & 1);
    issue_scores<S>(scores, at.k, operand_at(at.q, (number + 1) % S::STAGES * S::BOX));
    if constexpr (S::FUSED) {
        mma_wait<1>();
        pin(dq);
        __syncwarp();
        if (at.elected) barrier_arrive(S::ready_ds(at.barriers));
        if (number > 0) add_dq<S>(p, at, dq, number - 1);
    }
    mma_wait<0>();
    pin(scores);
    give_back(S::empty_q(at.barriers, stage), at.elected);
}

// Sets the weights of queries that a key does not see to 0. number: of the step.
template <typename S>
__device__ __forceinline__ void mask_weights(const KvOperands& at, float (&weights)[S::BQ / 2], int number) {
    const int masks = masks_of<S>(at, number);
    if (masks == UNMASKED) return;
    const int lane = threadIdx.x % 32;
    const uint32_t from = at.masks + number % S::STAGES * (GROUPS * S::MASKS);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int word = 0; word < S::BQ / 32; ++word) {
            uint32_t seen;
            asm volatile("ld.shared.b32 %0, [%1];" : "=r"(seen) : "r"(from + 8 * half * S::MASK + 4 * word));
            seen >>= lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (!(seen & 1u << (8 * j + i))) weights[16 * word + 4 * j + 2 * half + i] = 0.0f;
        }
}

}  // namespace stattn::attention_bwd
