// Attention backward on Hopper, by key tiles: dK and dV, and with FUSED the sums of dQ.
//
// A thread block has a tile of 2 x 64 keys of one head and goes through boxes of BQ queries, those of all heads that
// share the keys. A producer warpgroup brings Q, dO and the rows' stats by tensor copies through two rings in shared
// memory; where lists are strangers to each other, through two for each consumer. Each of two consumer warpgroups has 64
// keys and computes, with keys as rows so that P and dS are operands in registers,
//
//     P^T = 2^(c K Q^T - L);  dP^T = V dO^T;  dS^T = P^T (dP^T - delta);  dV += P^T dO;  dK += dS^T Q
//
// with c = scale log2(e), and writes dS to shared memory. From there each takes a half of dQ = dS K, 64 x 64 of all
// keys, one box late, so that the warpgroups need not keep step; a warp stages its 16 rows in shared memory, and a
// copy adds them to dQ's sums: to 4 KB of their box in the order of the warp's registers, or where boxes overlap, which
// takes longer, to rows in their places. dK and dQ get the scale at the end.
//
// The scores of a box are issued one box early. At the end of a box no product is under way: waits for some but not all
// products must not reach from one pass of the loop into the next, or the compiler runs the products one by one.
//
// Keys and queries outside the tensors are 0. For queries that is enough: dO = delta = 0, so that dS = 0. The weights of
// such keys may be anything, so their dS goes where nobody reads it. So it is with keys that are not real, and with what
// the rows of a slab or box have that is smaller than 64 or BQ.
#pragma once

#include "attention_bwd_kv_parts.cuh"

namespace stattn::attention_bwd {

// The producer.

// Writes down what the consumers need to know of a box. number: of the place for it.
template <typename S>
__device__ __forceinline__ void note(uint32_t shared, int number, int4 box, int x, const int (&masks)[GROUPS]) {
    const uint32_t to = shared + S::NOTES_AT + number * S::NOTE;
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(box.x), "r"(box.y), "r"(box.z),
                 "r"(x * 4 + box.w)
                 : "memory");
    if constexpr (S::PLANNED)
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to + 16), "r"(masks[0]), "r"(masks[1]) : "memory");
}

template <typename S>
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, uint32_t full, int4 box, int x) {
#pragma unroll
    for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
        copy_in(to + chunk * S::BOX_CHUNK, map, full, EVICT_LAST, 64 * chunk, box.z, box.y, box.x, x);
}

template <typename S>
__device__ __forceinline__ void load_stats(const KvParameters& p, int which, uint32_t shared, uint32_t full, int4 box,
                                           int place, int x) {
    int w = box.z, residue = 0;
    if (S::PLANNED && p.stats_step > 1 && box.w == VIDEO) {
        w = box.z / p.stats_step;
        residue = box.z - w * p.stats_step;
    }
    copy_in(shared + S::STATS_AT + place * S::STATS, &p.stats[which][box.w], full, EVICT_LAST, w,
            residue, box.y, box.x, x);
}

template <typename S>
__device__ __forceinline__ void produce(const KvParameters& p, uint32_t shared, uint32_t barriers, int ring) {
    const KeyTile tile = tile_at<S>(p, tile_number<S>(shared));
    const int k_x = tile.batch * p.k_x.batch + tile.head * p.k_x.head;
    const int v_x = tile.batch * p.v_x.batch + tile.head * p.v_x.head;
    const uint32_t tile_bytes = GROUPS * (S::PLANNED && tile.kind != VIDEO ? S::CHUNKS * S::SLAB_CHUNK : p.slab_bytes);
    if (ring == 0) barrier_expect(S::full_k(barriers), tile_bytes);
    for (int group = 0; ring == 0 && group < GROUPS; ++group) {
        const Corner corner = corner_of(p, tile, group);
        for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
            copy_in(shared + S::K_AT + chunk * S::TILE_CHUNK + group * S::SLAB_CHUNK, &p.k[tile.kind],
                    S::full_k(barriers), EVICT_FIRST, 64 * chunk, corner.w, corner.h, corner.t, k_x);
    }
    if (ring == 0) barrier_expect(S::full_v(barriers), tile_bytes);
    for (int group = 0; ring == 0 && group < GROUPS; ++group) {
        const Corner corner = corner_of(p, tile, group);
        for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
            copy_in(shared + S::V_AT + chunk * S::TILE_CHUNK + group * S::SLAB_CHUNK, &p.v[tile.kind],
                    S::full_v(barriers), EVICT_FIRST, 64 * chunk, corner.w, corner.h, corner.t, v_x);
    }

    if constexpr (S::APART) p.together.begin(seen_boxes<S>(shared, ring));
    if constexpr (S::LISTED) {
        const int4 list = record_at(p, tile_record(p, tile, tile.head * p.queries_per_key) + 1);
        p.together.begin(p.queries_per_key * list.y);
    }
    const uint32_t boxes = shared + ring * S::STAGES * S::BOX, mine = barriers + ring * S::RING_BARRIERS;
    int number = 0;  // of the step
    int skipped = tile.first, left = tile.steps;
    for (int each = 0; each < p.queries_per_key; ++each) {
        const int head = tile.head * p.queries_per_key + each;
        int4 list = {0, p.boxes, 0, 0};
        if constexpr (S::PLANNED) list = record_at(p, tile_record(p, tile, head) + 1);
        int i = 0;
        if constexpr (S::CUT) {
            i = min(skipped, p.boxes);
            skipped -= i;
        }
        for (; i < list.y; ++i) {
            if (S::CUT && left-- == 0) return;
            int4 box = {0, 0, i * S::BQ, 0};
            int masks[GROUPS] = {UNMASKED, UNMASKED};
            if constexpr (S::PLANNED) {
                box = record_at(p, list.x + i);
                if (i < list.w) {
#pragma unroll
                    for (int group = 0; group < GROUPS; ++group) {
                        const int4 record = record_at(p, list.z + (S::APART ? ring : group) * list.w + i);
                        masks[group] = record.w < 0 ? record.w : record.x;
                    }
                }
                if (S::APART && masks[0] == UNSEEN) continue;
            }
            const int stage = number % S::STAGES, parity = number / S::STAGES & 1;
            barrier_wait(S::empty_q(mine, stage), parity ^ 1);
            note<S>(shared, ring * S::NOTES + number % S::NOTES, box, tile.batch * p.heads + head, masks);
            uint32_t bytes = p.box_bytes + p.stats_bytes;
            if constexpr (S::APART)
                bytes += (masks[0] >= 0) * S::MASKS;
            else if constexpr (S::PLANNED)
                bytes += ((masks[0] >= 0) + (masks[1] >= 0)) * S::MASKS;
            barrier_expect(S::full_q(mine, stage), bytes);
            load_box<S>(boxes + S::Q_AT + stage * S::BOX, &p.q[box.w], S::full_q(mine, stage), box,
                        tile.batch * p.q_x.batch + head * p.q_x.head);
            const int stats = ring * 2 * S::STAGES + stage;
            load_stats<S>(p, 0, shared, S::full_q(mine, stage), box, stats, tile.batch * p.heads + head);
            if constexpr (S::PLANNED) {
#pragma unroll
                for (int group = 0; group < GROUPS / S::RINGS; ++group)
                    if (masks[group] >= 0)
                        copy_in_line(shared + S::MASKS_AT + (stage * GROUPS + ring + group) * S::MASKS,
                                     reinterpret_cast<const uint8_t*>(p.plan) + int64_t{masks[group]} * S::MASKS,
                                     S::MASKS, S::full_q(mine, stage));
            }

            barrier_wait(S::empty_do(mine, stage), parity ^ 1);
            barrier_expect(S::full_do(mine, stage), p.box_bytes + p.stats_bytes);
            load_box<S>(boxes + S::DO_AT + stage * S::BOX, &p.dout[box.w], S::full_do(mine, stage), box,
                        tile.batch * p.dout_x.batch + head * p.dout_x.head);
            load_stats<S>(p, 1, shared, S::full_do(mine, stage), box, stats + S::STAGES, tile.batch * p.heads + head);
            ++number;
        }
    }
    if constexpr (S::LISTED || S::APART) p.together.end(GROUPS / S::RINGS);
}

// Adds a warpgroup's parts of dQ to the sums, each when all tiles of keys before this one have added theirs. By one thread.
template <typename S>
__device__ __forceinline__ void add_in_order(const KvParameters& p, uint32_t shared, uint32_t barriers, int group) {
    const KeyTile tile = tile_at<S>(p, tile_number<S>(shared));
    // The boxes of heads that share keys lie one behind the other.
    const int64_t first = (int64_t{tile.batch} * p.heads + tile.head * p.queries_per_key) * p.boxes * GROUPS + group;
    float* to = p.sums + first * (S::STAGED / 4);
    int* turn = p.turns + 4 + first;
    for (int number = 0; number < tile.steps; ++number, to += GROUPS * (S::STAGED / 4), turn += GROUPS) {
        const int staging = number % S::STAGINGS;
        while (load_acquire(turn) != tile.number) {
        }
        global_proxy_fence();
        barrier_wait(S::full_dq(barriers, group, staging), number / S::STAGINGS & 1);
        copy_add_line(to, shared + S::STAGED_AT + (group * S::STAGINGS + staging) * S::STAGED, S::STAGED);
        copy_out_commit();
        copy_out_wait();
        barrier_arrive(S::empty_dq(barriers, group, staging));
        global_proxy_fence();
        store_release(turn, tile.number + 1);
    }
}

// Lists.

// Counts what each warpgroup's keys see. Where most of it is the same, the same rings bring it to both; strangers have
// rings each, and neither waits for the other, nor for boxes that it does not see. By all threads.
template <typename S>
__device__ __forceinline__ bool are_strangers(const KvParameters& p, uint32_t shared) {
    if (threadIdx.x < GROUPS)
        asm volatile("st.shared.s32 [%0], 0;" ::"r"(shared + S::TILE_AT + 4 * threadIdx.x) : "memory");
    __syncthreads();
    const KeyTile tile = tile_at<S>(p, blockIdx.x);
    int boxes = 0;
    for (int each = 0; each < p.queries_per_key; ++each) {
        const int4 list = record_at(p, tile_record(p, tile, tile.head * p.queries_per_key + each) + 1);
        boxes += list.y;
        for (int group = 0; group < GROUPS; ++group) {
            int seen = 0;
            for (int i = threadIdx.x; i < list.y; i += S::THREADS)
                seen += i >= list.w || record_at(p, list.z + group * list.w + i).w != UNSEEN;
            seen = __reduce_add_sync(0xFFFFFFFF, seen);
            if (threadIdx.x % 32 == 0)
                asm volatile("red.shared.add.s32 [%0], %1;" ::"r"(shared + S::TILE_AT + 4 * group), "r"(seen) : "memory");
        }
    }
    __syncthreads();
    return 3 * boxes > 2 * (seen_boxes<S>(shared, 0) + seen_boxes<S>(shared, 1));
}

// The consumers.

template <typename S>
__device__ __forceinline__ void consume(const KvParameters& p, uint32_t shared, uint32_t barriers) {
    using Element = typename S::Element;
    const int lane = threadIdx.x % 32;
    KvOperands at;
    // A shuffle tells the compiler that this is the same in the whole warp: descriptors then stay in uniform registers.
    at.group = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128 - 1, 0);
    at.warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32 % 4, 0);
    at.elected = lane == 0;
    const int ring = S::APART ? at.group : 0;
    at.barriers = barriers + ring * S::RING_BARRIERS;
    at.c = p.scale_log2;
    at.k = operand(shared + S::K_AT + at.group * S::SLAB_CHUNK, 16);
    at.v = operand(shared + S::V_AT + at.group * S::SLAB_CHUNK, 16);
    at.q = operand(shared + S::Q_AT + ring * S::STAGES * S::BOX, S::BOX_CHUNK);
    at.dout = operand(shared + S::DO_AT + ring * S::STAGES * S::BOX, S::BOX_CHUNK);
    at.ds = operand(shared + S::DS_AT + (S::D == 64 ? at.group : 0) * S::DS_CHUNK, 16);
    at.k_part = operand(shared + S::K_AT + (S::D == 64 ? 0 : at.group) * S::TILE_CHUNK, 16);
    at.stats = shared + S::STATS_AT + ring * 2 * S::STAGES * S::STATS + lane % 4 * 8;
    at.masks = shared + S::MASKS_AT + at.group * S::MASKS + (at.warp * 16 + lane / 4) * S::MASK;
    at.staged = shared + S::STAGED_AT + at.group * S::STAGINGS * S::STAGED +
                at.warp * (S::PLANNED && !p.in_boxes ? 2048 : 4096);
    at.notes = shared + S::NOTES_AT + ring * S::NOTES * S::NOTE;

    int steps;
    {
        const KeyTile tile = tile_at<S>(p, tile_number<S>(shared));
        steps = tile.steps;
        const Corner corner = corner_of(p, tile, at.group);
        const int row = at.warp * 16 + lane % 16;
        const bool real = real_key<S>(p, tile, corner, row);
        at.ds_real = real ? ~0u : 0u;
        const uint32_t place = S::DS_AT + (at.group * SLAB + row) * 128 + (lane / 16 ^ row % 8) * 16;
        at.ds_to = shared + (real ? place : S::UNREAD_AT);
        if constexpr (S::APART) {
            steps = seen_boxes<S>(shared, at.group);
        } else if constexpr (S::PLANNED) {
            for (int each = 0; each < p.queries_per_key; ++each)
                steps += record_at(p, tile_record(p, tile, tile.head * p.queries_per_key + each) + 1).y;
        }
    }

    float scores[S::BQ / 2], dk[S::D / 2], dv[S::D / 2];
#pragma unroll
    for (int i = 0; i < S::D / 2; ++i) {
        dk[i] = dv[i] = 0.0f;
        asm volatile("" : "+f"(dk[i]), "+f"(dv[i]));
    }

    barrier_wait(S::full_k(barriers), 0);
    barrier_wait(S::full_v(barriers), 0);
    if (steps > 0) {
        barrier_wait(S::full_q(at.barriers, 0), 0);
        issue_scores<S>(scores, at.k, at.q);
        mma_wait<0>();
        pin(scores);
    }
#pragma unroll 1
    for (int number = 0; number < steps; ++number) {
        if (S::PLANNED && !S::APART && __shfl_sync(0xFFFFFFFF, masks_of<S>(at, number), 0) == UNSEEN) {
            leave_out<S>(p, at, scores, number, steps);
            continue;
        }
        const int stage = number % S::STAGES, parity = number / S::STAGES & 1;
        const uint64_t q = operand_at(at.q, stage * S::BOX), dout = operand_at(at.dout, stage * S::BOX);
        const uint32_t stats = at.stats + stage * S::STATS;
        float dp[S::BQ / 2];
        barrier_wait(S::full_do(at.barriers, stage), parity);
        issue_scores<S>(dp, at.v, dout);
#pragma unroll
        for (int j = 0; j < S::BQ / 8; ++j) {
            float lse[2];
            load_pair(lse[0], lse[1], stats + j * 32);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                scores[4 * j + i] = exp2_approx(fmaf(scores[4 * j + i], at.c, -lse[i % 2]));
        }
        if constexpr (S::PLANNED) mask_weights<S>(at, scores, number);
        mma_wait<0>();
        pin(dp);
        // In two halves, so that fewer registers are needed at a time.
        uint32_t weights[S::BQ / 16][4], ds[S::BQ / 16][4];
        const uint32_t delta = stats + S::STAGES * S::STATS;
        pack_half<S, 0>(weights, scores);
        mma_fence();
        issue_half<S, 0>(dv, weights, dout);
        if constexpr (S::FUSED) barrier_wait(S::ready_ds(at.barriers), (number & 1) ^ 1);
        weigh_half<S, 0>(scores, dp, ds, delta, at, number);
        pack_half<S, 1>(weights, scores);
        mma_fence();
        issue_half<S, 1>(dv, weights, dout);
        mma_commit();
        weigh_half<S, 1>(scores, dp, ds, delta, at, number);

        float dq[32];
        if constexpr (S::FUSED) {
            issue_dq<S>(dq, operand_at(at.ds, ((number & 1) ^ 1) * S::DS), at.k_part);
            mma_wait<1>();
        } else if constexpr (S::D == 64) {
            mma_wait<0>();  // for want of registers
        }
        if constexpr (S::FUSED || S::D == 64) {
            pin(dv);
            give_back(S::empty_do(at.barriers, stage), at.elected);
        }
        mma_fence();
        issue_half<S, 0>(dk, ds, q);
        issue_half<S, 1>(dk, ds, q);
        mma_commit();
        if constexpr (S::FUSED) proxy_fence();
        if (number + 1 < steps)
            barrier_wait(S::full_q(at.barriers, (number + 1) % S::STAGES), (number + 1) / S::STAGES & 1);
        issue_scores<S>(scores, at.k, operand_at(at.q, (number + 1) % S::STAGES * S::BOX));
        if constexpr (S::FUSED) {
            mma_wait<2>();
            pin(dq);
            __syncwarp();
            if (at.elected) barrier_arrive(S::ready_ds(at.barriers));
            if (number > 0) add_dq<S>(p, at, dq, number - 1);
        } else if constexpr (S::D == 128) {
            mma_wait<2>();
            pin(dv);
            give_back(S::empty_do(at.barriers, stage), at.elected);
        }
        mma_wait<0>();
        pin(scores);
        pin(dk);
        give_back(S::empty_q(at.barriers, stage), at.elected);
    }
    if (S::FUSED && steps > 0) {
        float dq[32];
        const int last = steps - 1;
        barrier_wait(S::ready_ds(at.barriers), last & 1);
        issue_dq<S>(dq, operand_at(at.ds, (last & 1) * S::DS), at.k_part);
        mma_wait<0>();
        pin(dq);
        add_dq<S>(p, at, dq, last);
    }

    // Known anew, so as to keep no registers through the loop.
    int index = tile_number<S>(shared), thread = threadIdx.x % 128;
    asm volatile("" : "+r"(index), "+r"(thread));
    const KeyTile tile = tile_at<S>(p, index);
    const Corner corner = corner_of(p, tile, at.group);
#pragma unroll
    for (int i = 0; i < S::D / 2; ++i) dk[i] *= p.scale;
    if (S::PLANNED && tile.kind != VIDEO && p.valid) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (real_key<S>(p, tile, corner, thread / 32 * 16 + thread % 32 / 4 + 8 * half)) continue;
#pragma unroll
            for (int i = 2 * half; i < S::D / 2; i += 4) dk[i] = dk[i + 1] = dv[i] = dv[i + 1] = 0.0f;
        }
    }
    if ((S::PLANNED || S::CUT) && tile.piece >= 0) {
        const int64_t piece =
            S::PLANNED ? (int64_t{tile.batch} * p.key_heads + tile.head) * p.pieces + tile.piece : tile.piece;
        float* to = p.partial + (piece * 2 * KEYS + at.group * SLAB + thread / 32 * 16 + thread % 32 / 4) * p.head_dim;
#pragma unroll
        for (int j = 0; j < S::D / 8; ++j) {
            const int column = 8 * j + thread % 4 * 2;
            if (column >= p.head_dim) break;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = 4 * j + 2 * half;
                float* row = to + 8 * half * p.head_dim + column;
                *reinterpret_cast<float2*>(row) = {dk[i], dk[i + 1]};
                *reinterpret_cast<float2*>(row + KEYS * p.head_dim) = {dv[i], dv[i + 1]};
            }
        }
        // Shared memory stays until all copies have read it.
        copy_out_wait_read();
        return;
    }

    // The gradients take the place of K and V; the other warpgroup may still read K for dQ.
    if constexpr (S::FUSED) named_sync(3, 256);
    const int row = thread / 32 * 16 + thread % 16;
#pragma unroll
    for (int step = 0; step < S::D / 16; ++step) {
        const int column = step % 4 * 2 + thread % 32 / 16;  // in words of 16 bytes
        const uint32_t to = shared + step / 4 * S::TILE_CHUNK + at.group * S::SLAB_CHUNK + row * 128 +
                            (column ^ row % 8) * 16;
        const float *k = dk + 8 * step, *v = dv + 8 * step;
        store_matrices(to + S::K_AT, pack<Element>(k[0], k[1]), pack<Element>(k[2], k[3]), pack<Element>(k[4], k[5]),
                       pack<Element>(k[6], k[7]));
        store_matrices(to + S::V_AT, pack<Element>(v[0], v[1]), pack<Element>(v[2], v[3]), pack<Element>(v[4], v[5]),
                       pack<Element>(v[6], v[7]));
    }
    proxy_fence();
    named_sync(1 + at.group, 128);
    if (thread == 0) {
        const int dk_x = tile.batch * p.dk_x.batch + tile.head * p.dk_x.head;
        const int dv_x = tile.batch * p.dv_x.batch + tile.head * p.dv_x.head;
#pragma unroll
        for (int chunk = 0; chunk < S::CHUNKS; ++chunk) {
            const uint32_t from = shared + chunk * S::TILE_CHUNK + at.group * S::SLAB_CHUNK;
            copy_out(&p.dk[tile.kind], from + S::K_AT, EVICT_FIRST, 64 * chunk, corner.w, corner.h, corner.t, dk_x);
            copy_out(&p.dv[tile.kind], from + S::V_AT, EVICT_FIRST, 64 * chunk, corner.w, corner.h, corner.t, dv_x);
        }
        copy_out_commit();
    }
    copy_out_wait_read();
}

// Fills shared memory with 0.
__device__ __forceinline__ void clear(uint32_t from, uint32_t bytes) {
    for (uint32_t i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(from + i), "r"(0) : "memory");
}

template <typename S>
__device__ __forceinline__ void init_barriers(const KvParameters& p, uint32_t shared, uint32_t barriers) {
    for (int ring = 0; ring < S::RINGS; ++ring)
        for (int stage = 0; stage < S::STAGES; ++stage) {
            const uint32_t mine = barriers + ring * S::RING_BARRIERS;
            barrier_init(S::full_q(mine, stage), 1);
            barrier_init(S::full_do(mine, stage), 1);
            // One arrival a warp: a thread's wait proves only that its own warp's products are done.
            barrier_init(S::empty_q(mine, stage), 4 * GROUPS / S::RINGS);
            barrier_init(S::empty_do(mine, stage), 4 * GROUPS / S::RINGS);
        }
    barrier_init(S::full_k(barriers), 1);
    barrier_init(S::full_v(barriers), 1);
    barrier_init(S::ready_ds(barriers), 4 * GROUPS);
    for (int i = 0; S::IN_ORDER && i < GROUPS * S::STAGINGS; ++i) {
        barrier_init(S::full_dq(barriers, 0, i), 4);
        barrier_init(S::empty_dq(barriers, 0, i), 1);
    }
    barrier_init_fence();
    if constexpr (S::IN_ORDER)
        asm volatile("st.shared.s32 [%0], %1;" ::"r"(shared + S::TILE_AT), "r"(atomicAdd(p.turns, 1)) : "memory");
}

template <typename S>
__device__ __forceinline__ void run(const KvParameters& p, uint32_t shared, uint32_t barriers) {
    if (threadIdx.x < 128) {
        registers_shrink<S::PRODUCER_REGISTERS>();
        const int ring = S::APART ? __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0) : threadIdx.x / 32;
        if (threadIdx.x % 32 == 0 && ring < S::RINGS) produce<S>(p, shared, barriers, S::APART ? ring : 0);
        if constexpr (S::IN_ORDER) {
            const int group = threadIdx.x / 32 - 1;
            if (threadIdx.x % 32 == 0 && 0 <= group && group < GROUPS) add_in_order<S>(p, shared, barriers, group);
        }
    } else {
        registers_grow<S::CONSUMER_REGISTERS>();
        consume<S>(p, shared, barriers);
    }
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1) attention_backward_kv(const __grid_constant__ KvParameters p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t shared = __shfl_sync(0xFFFFFFFF, shared_address(memory), 0);
    const uint32_t barriers = shared + S::BARRIERS_AT;
    bool strangers = false;
    if constexpr (S::LISTED) {
        strangers = are_strangers<S>(p, shared);
        if (threadIdx.x == 0 && strangers) init_barriers<typename S::Apart>(p, shared, barriers);
    }
    if (threadIdx.x == 0 && !strangers) init_barriers<S>(p, shared, barriers);
    // What no copy writes must be 0 all the same: a weight of 0 does not make up for a NaN.
    if (S::PLANNED && (p.slab_rows < SLAB || p.box_rows < S::BQ)) {
        clear(shared, S::DS_AT);
        clear(shared + S::STATS_AT, S::MASKS_AT - S::STATS_AT);
    }
    if constexpr (S::FUSED) clear(shared + S::DS_AT, 2 * S::DS);
    proxy_fence();
    __syncthreads();

    if constexpr (S::LISTED) {
        static_assert(S::TILE_AT == S::Apart::TILE_AT && S::DS_AT == S::Apart::DS_AT);
        if (strangers) {
            run<typename S::Apart>(p, shared, barriers);
            return;
        }
    }
    run<S>(p, shared, barriers);
}

}  // namespace stattn::attention_bwd
