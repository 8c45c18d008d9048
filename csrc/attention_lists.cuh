// Attention forward on Hopper where lists on the device say which tiles of keys each tile of queries sees.
//
// A block computes three slabs of at most 64 queries that lie side by side, one for each consumer warpgroup, as
// attention_fwd.cuh does; tiles of queries and keys are cut into slabs and into boxes of at most 64 keys. A pass before
// (`join_lists`) gathers what the three see. Where most of it is the same, one producer warp brings the union through one
// ring and each warpgroup leaves out what is not its own: keys are read once for all. Where lists are strangers, three
// warps bring three lists through three rings, a third as deep each, and warpgroups wait for nothing but their own keys.
//
// Keys and values take turns in a ring, and a stage is free again as soon as one product is done. In the joint ring keys
// run one box ahead, K_0, K_1, V_0, K_2, V_1, ..., and products run under the softmax as in attention_fwd.cuh. A ring of
// three stages cannot have all of K_i, V_i-1, K_i+1 and V_i; there a box is finished before the next, K_0, V_0, K_1, ...,
// each copy has the time of a whole box to come, and the products of the other warpgroups run under the softmax.
#pragma once

#include "attention_fwd.cuh"
#include "attention_lists.h"

namespace stattn::attention_lists {

using namespace attention_fwd;

constexpr int GROUPS = 3;

template <typename Element_, int D_>
struct ListShape {
    using Element = Element_;
    static constexpr bool PLANNED = true;
    static constexpr bool PIECES = false;
    static constexpr int D = D_;
    static constexpr int WARPGROUPS = GROUPS;
    static constexpr int BN = 64;
    static constexpr int THREADS = 128 * (WARPGROUPS + 1);
    static constexpr int CHUNKS = D / 64;
    static constexpr uint32_t SLAB_CHUNK = ROWS * 128;
    static constexpr uint32_t SLAB = CHUNKS * SLAB_CHUNK;
    static constexpr uint32_t BOX_CHUNK = BN * 128;
    static constexpr uint32_t BOX = CHUNKS * BOX_CHUNK;
    static constexpr int OWN = D == 128 ? 3 : 6;  // stages of a warpgroup's own ring
    static constexpr int STAGES = WARPGROUPS * OWN;
    static constexpr uint32_t Q_AT = 0;
    static constexpr uint32_t RING_AT = Q_AT + WARPGROUPS * SLAB;
    static constexpr uint32_t ROWS_AT = RING_AT + STAGES * BOX;  // (t, h, w) of each row, 16 bytes
    static constexpr uint32_t BARRIERS_AT = ROWS_AT + WARPGROUPS * ROWS * 16;
    static constexpr uint32_t VALID = 0;  // no list has global tokens
    static constexpr uint32_t LAUNCHED = BARRIERS_AT + 8 * (2 * STAGES + 2 * WARPGROUPS) + 1024;
    static constexpr int CONSUMER_REGISTERS = 152;
    static constexpr int PRODUCER_REGISTERS = 56;
    static_assert(LAUNCHED <= 232448);

    __device__ static uint32_t full(uint32_t base, int stage) { return base + 8 * stage; }
    __device__ static uint32_t empty(uint32_t base, int stage) { return base + 8 * (STAGES + stage); }
    __device__ static uint32_t full_q(uint32_t base, int group) { return base + 8 * (2 * STAGES + group); }
    __device__ static uint32_t empty_q(uint32_t base, int group) { return base + 8 * (2 * STAGES + WARPGROUPS + group); }
};

// A place in a ring of `depth` stages, and the parity of its present use.
struct Place {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance(int by, int depth) {
        stage += by;
        if (stage >= depth) stage -= depth, parity ^= 1;
    }
};

// What a block works on.
struct Work {
    Tile tile;
    const int* list;  // of the first warpgroup, or of all
    int4 counts;      // entries of each warpgroup's list; of all in x, if w: the list is of all
};

template <typename S>
__device__ __forceinline__ Work work_of(const ListParameters& l) {
    const Parameters& p = l.p;
    const int number = blockIdx.x % l.triples, sequence = blockIdx.x / l.triples;
    Work work;
    work.tile = Tile{};
    work.tile.head = sequence % p.heads, work.tile.batch = sequence / p.heads;
    work.tile.piece = -1;
    const int w = number % l.blocks[2], h = number / l.blocks[2] % l.blocks[1], t = number / l.blocks[2] / l.blocks[1];
    work.tile.t = t * l.block[0], work.tile.h = h * l.block[1], work.tile.w = w * l.block[2];
    const int set = work.tile.batch % l.samples * l.list_heads + work.tile.head % l.list_heads;
    const int64_t joined = int64_t{set} * l.triples + number;
    work.counts = __ldg(l.counts + joined);
    work.list = l.lists + joined * GROUPS * l.room;
    return work;
}

// The producer.

// Blocks that begin together walk through the keys together, and then find them in the L2 cache. They drift apart from
// wave to wave, so a block begins when most of the wave before its own have asked for their last box; but it does not wait
// for long: where lists differ much in length, no order of blocks helps.
__device__ __forceinline__ void begin_together(const ListParameters& l, int boxes) {
    if (l.processors == 0) return;
    const int before = (static_cast<int>(blockIdx.x / l.processors) * l.processors - l.stragglers) * GROUPS;
    const int64_t start = clock64(), most = int64_t{boxes} * l.patience;
    int done;
    while (true) {
        asm volatile("ld.relaxed.gpu.b32 %0, [%1];" : "=r"(done) : "l"(l.done));
        if (done >= before || clock64() - start > most) break;
        __nanosleep(200);
    }
}

__device__ __forceinline__ void end_loads(const ListParameters& l, int producers) {
    if (l.processors) asm volatile("red.relaxed.gpu.add.u32 [%0], %1;" ::"l"(l.done), "r"(producers) : "memory");
}

template <typename S>
struct ListLoader {
    const Parameters& p;
    uint32_t ring, barriers;  // of the first stage
    int depth, k_x, v_x;
    Place place;
    bool ahead;   // keys run one box ahead of values
    int t, h, w;  // of the box whose values are still to come
    bool waiting = false;

    __device__ __forceinline__ void load(const CUtensorMap* map, int box_t, int box_h, int box_w, int x) {
        barrier_wait(S::empty(barriers, place.stage), place.parity ^ 1);
        load_box<S>(ring + place.stage * S::BOX, map, S::full(barriers, place.stage), p.box_bytes, box_t, box_h, box_w, x);
        place.advance(1, depth);
    }
    __device__ __forceinline__ void finish() {
        if (waiting) load(&p.v_map, t, h, w, v_x);
        waiting = false;
    }
    __device__ __forceinline__ void visit(int box_t, int box_h, int box_w) {
        load(&p.k_map, box_t, box_h, box_w, k_x);
        if (ahead) finish();
        t = box_t, h = box_h, w = box_w, waiting = true;
        if (!ahead) finish();
    }
};

template <typename S>
__device__ __forceinline__ void produce(const ListParameters& l, uint32_t shared, uint32_t barriers, int group) {
    const Parameters& p = l.p;
    const Work work = work_of<S>(l);
    const bool joint = work.counts.w;
    if (joint && group > 0) return;
    const int count = group == 0 ? work.counts.x : group == 1 ? work.counts.y : work.counts.z;
    const int* list = work.list + group * l.room;
    const int head = work.tile.head / p.queries_per_key, first = group * S::OWN;
    ListLoader<S> loader{p, shared + S::RING_AT + first * S::BOX, barriers + 8 * first, joint ? S::STAGES : S::OWN,
                         work.tile.batch * p.k_x.batch + head * p.k_x.head,
                         work.tile.batch * p.v_x.batch + head * p.v_x.head, {}, joint};
    int next = count > 0 ? __ldg(list) : 0;
    if (!joint) begin_together(l, count * l.boxes);
    for (int number = 0; number < count; ++number) {
        const int entry = next;
        if (number + 1 < count) next = __ldg(list + number + 1);
        const int3 tile = l.entry.tile(entry);
        for (int t = 0; t < l.k_tile[0]; t += l.box[0])
            for (int h = 0; h < l.k_tile[1]; h += l.box[1])
                for (int w = 0; w < l.k_tile[2]; w += l.box[2])
                    loader.visit(tile.x * l.k_tile[0] + t, tile.y * l.k_tile[1] + h, tile.z * l.k_tile[2] + w);
    }
    loader.finish();
    end_loads(l, joint ? GROUPS : 1);
}

template <typename S>
__device__ __forceinline__ void produce_slabs(const ListParameters& l, uint32_t shared, uint32_t barriers) {
    const Parameters& p = l.p;
    const Work work = work_of<S>(l);
    for (int group = 0; group < S::WARPGROUPS; ++group) {
        const Corner corner = corner_of<S>(p, work.tile, group);
        barrier_expect(S::full_q(barriers, group), p.slab_bytes);
#pragma unroll
        for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
            copy_in(shared + S::Q_AT + group * S::SLAB + chunk * S::SLAB_CHUNK, &p.q_map, S::full_q(barriers, group),
                    EVICT_FIRST, 64 * chunk, corner.w, corner.h, corner.t,
                    work.tile.batch * p.q_x.batch + work.tile.head * p.q_x.head);
    }
}

// The consumers.

// Notes where the rows of all slabs lie, for masks.
template <typename S>
__device__ __forceinline__ void note_rows(const ListParameters& l, uint32_t to) {
    const Parameters& p = l.p;
    const int number = blockIdx.x % l.triples;
    const int corner[3] = {number / l.blocks[2] / l.blocks[1] * l.block[0], number / l.blocks[2] % l.blocks[1] * l.block[1],
                           number % l.blocks[2] * l.block[2]};
    for (int i = threadIdx.x; i < S::WARPGROUPS * ROWS; i += S::THREADS) {
        const int group = i / ROWS, row = i % ROWS;
        const int t = corner[0] + group * p.slab_step[0] + row / (p.slab[1] * p.slab[2]);
        const int h = corner[1] + group * p.slab_step[1] + row / p.slab[2] % p.slab[1];
        const int w = corner[2] + group * p.slab_step[2] + row % p.slab[2];
        // Rows that are none have the masks of others.
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + i * 16), "r"(min(t, p.q_shape[0] - 1)),
                     "r"(min(h, p.q_shape[1] - 1)), "r"(min(w, p.q_shape[2] - 1)), "r"(0)
                     : "memory");
    }
}

// Where a warpgroup finds what it works on; descriptors are those of its ring's first stage.
struct ListOperands {
    uint64_t q, k, v;
    uint32_t barriers, rows;
    int depth;
    bool elected;
    float c;
};

// A box: its first key in boxes of each axis, and whether what `mask` allows is all that is seen, or but for what lies
// outside of the tile.
struct Seen {
    int t, h, w;
    bool partial;
};

template <typename S>
__device__ __forceinline__ void load_mask(BoxMask<S>& mask, const ListParameters& l, uint32_t rows, const Seen& seen) {
#pragma unroll
    for (int half = 0; half < 2; ++half) mask.words[half][0] = mask.words[half][1] = 0;
    const int last = seen.partial ? l.products : 0;
    for (int product = seen.partial ? 1 : 0; product <= last; ++product) {
        const int4 first = __ldg(reinterpret_cast<const int4*>(l.tables) + 2 * product);
        const int4 step = __ldg(reinterpret_cast<const int4*>(l.tables) + 2 * product + 1);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int t, h, w;
            asm volatile("{\n.reg .b32 unused;\nld.shared.v4.b32 {%0, %1, %2, unused}, [%3];\n}"
                         : "=r"(t), "=r"(h), "=r"(w)
                         : "r"(rows + (first_row() + 8 * half) * 16));
            const int2* const words = reinterpret_cast<const int2*>(l.tables);
            const int2 of_t = __ldg(words + first.x + t * step.x + seen.t), of_h = __ldg(words + first.y + h * step.y + seen.h);
            const int2 of_w = __ldg(words + first.z + w * step.z + seen.w);
            mask.words[half][0] |= of_t.x & of_h.x & of_w.x;
            mask.words[half][1] |= of_t.y & of_h.y & of_w.y;
        }
    }
}

template <typename S>
struct ListConsumer {
    const ListParameters& l;
    const ListOperands& at;
    Place k, v;  // of this box's keys; of the values of the box before it
    Rows rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    float scores[S::BN / 2];
    float out[S::D / 2];
    uint32_t weights[S::BN / 16][4];

    __device__ __forceinline__ void next_keys(bool first) { k.advance(first ? 1 : 2, at.depth); }
    // Goes to the values of a box, from those of the one before it.
    __device__ __forceinline__ void next_values(bool first, bool last) {
        if (first)
            v.stage = last ? 1 : 2;
        else
            v.advance(last ? 1 : 2, at.depth);
    }
    __device__ __forceinline__ void release(const Place& place) {
        if (at.elected) barrier_arrive(S::empty(at.barriers, place.stage));
    }

    template <bool MASKED>
    __device__ __forceinline__ void begin(const Seen& seen) {
        barrier_wait(S::full(at.barriers, k.stage), k.parity);
        issue_square<S>(scores, at.q, at.k + k.stage * (S::BOX / 16));
        BoxMask<S> mask;
        if constexpr (MASKED) load_mask<S>(mask, l, at.rows, seen);
        mma_wait<0>();
        pin(scores);
        release(k);
        if constexpr (MASKED) mask.apply(scores);
        float top[2], factor[2];
        const bool moved = find_tops<true>(scores, rows, top, factor, at.c);
        weigh<true, typename S::Element>(scores, weights, rows, top, factor, at.c);
        if (__any_sync(0xFFFFFFFF, moved)) rescale(out, factor);
    }

    template <bool MASKED>
    __device__ __forceinline__ void step(const Seen& seen) {
        barrier_wait(S::full(at.barriers, k.stage), k.parity);
        issue_square<S>(scores, at.q, at.k + k.stage * (S::BOX / 16));
        barrier_wait(S::full(at.barriers, v.stage), v.parity);
        issue_weighted<S>(out, weights, at.v + v.stage * (S::BOX / 16));
        BoxMask<S> mask;
        if constexpr (MASKED) load_mask<S>(mask, l, at.rows, seen);
        mma_wait<1>();
        pin(scores);
        release(k);
        if constexpr (MASKED) mask.apply(scores);
        float top[2], factor[2];
        const bool moved = find_tops<MASKED>(scores, rows, top, factor, at.c);
        mma_wait<0>();
        pin(out);
        release(v);
        weigh<MASKED, typename S::Element>(scores, weights, rows, top, factor, at.c);
        if (__any_sync(0xFFFFFFFF, moved)) rescale(out, factor);
    }

    __device__ __forceinline__ void finish() {
        barrier_wait(S::full(at.barriers, v.stage), v.parity);
        issue_weighted<S>(out, weights, at.v + v.stage * (S::BOX / 16));
        mma_wait<0>();
        pin(out);
        release(v);
    }

    __device__ __forceinline__ void leave_out() {
        barrier_wait(S::full(at.barriers, k.stage), k.parity);
        release(k);
        barrier_wait(S::full(at.barriers, v.stage), v.parity);
        release(v);
    }
};

template <typename S>
__device__ __forceinline__ void consume_lists(const ListParameters& l, uint32_t shared, uint32_t barriers) {
    const Parameters& p = l.p;
    const int group = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128 - 1, 0);
    const Work work = work_of<S>(l);
    const bool joint = __shfl_sync(0xFFFFFFFF, work.counts.w, 0);
    const int number = __shfl_sync(
        0xFFFFFFFF, joint || group == 0 ? work.counts.x : group == 1 ? work.counts.y : work.counts.z, 0);
    const int* list = work.list + (joint ? 0 : group * l.room);
    const int first_stage = joint ? 0 : group * S::OWN;
    ListOperands at;
    at.q = operand(shared + S::Q_AT + group * S::SLAB, 16);
    at.k = operand(shared + S::RING_AT + first_stage * S::BOX, 16);
    at.v = operand(shared + S::RING_AT + first_stage * S::BOX, S::BOX_CHUNK);
    at.barriers = barriers + 8 * first_stage;
    at.rows = shared + S::ROWS_AT + group * ROWS * 16;
    at.depth = joint ? S::STAGES : S::OWN;
    at.elected = threadIdx.x % 32 == 0;
    at.c = p.scale_log2;

    ListConsumer<S> state{l, at};
#pragma unroll
    for (int i = 0; i < S::D / 2; ++i) state.out[i] = 0.0f;
    barrier_wait(S::full_q(barriers, group), 0);
    const int boxes = number * l.boxes;
    int next = number > 0 ? __ldg(list) : 0, entry = 0, inside = l.boxes - 1;
    // The next box: `inside` counts the boxes of an entry.
    const auto advance = [&](int box) {
        ++inside;
        if (inside < l.boxes) return;
        entry = next, inside = 0;
        ++list;
        if (box + l.boxes < boxes) next = __ldg(list);
    };
    const auto has_mask = [&] { return entry >> (ENTRY_PARTIAL + group) & 1 || entry >> ENTRY_EDGE & 1; };
    const auto seen = [&] {
        const int3 tile = l.entry.tile(entry);
        const int w = inside % l.parts[2], h = inside / l.parts[2] % l.parts[1], t = inside / l.parts[2] / l.parts[1];
        return Seen{tile.x * l.parts[0] + t, tile.y * l.parts[1] + h, tile.z * l.parts[2] + w,
                    static_cast<bool>(entry >> (ENTRY_PARTIAL + group) & 1)};
    };
    if (joint) {
        bool started = false;  // whether there are weights whose output is still to come
#pragma unroll 1
        for (int box = 0; box < boxes; ++box) {
            advance(box);
            const bool first = box == 0, last = box == boxes - 1;
            if (!(entry >> (ENTRY_SEES + group) & 1)) {
                if (started) state.finish();
                started = false;
                state.next_values(first, last);
                state.leave_out();
            } else {
                if (has_mask()) {
                    if (started)
                        state.template step<true>(seen());
                    else
                        state.template begin<true>(seen());
                } else if (started) {
                    state.template step<false>({});
                } else {
                    state.template begin<false>({});
                }
                started = true;
                state.next_values(first, last);
            }
            state.next_keys(first);
        }
        if (started) state.finish();
    } else {
        state.v.stage = 1;
#pragma unroll 1
        for (int box = 0; box < boxes; ++box) {
            advance(box);
            if (has_mask())
                state.template begin<true>(seen());
            else
                state.template begin<false>({});
            state.finish();
            state.k.advance(2, at.depth);
            state.v.advance(2, at.depth);
        }
    }
    store<S>(p, work.tile, state.out, state.rows, shared + S::Q_AT + group * S::SLAB, S::empty_q(barriers, group), group);
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1) attention_forward_lists(const __grid_constant__ ListParameters l) {
    extern __shared__ uint8_t memory[];
    const uint32_t shared = __shfl_sync(0xFFFFFFFF, (shared_address(memory) + 1023) & ~1023u, 0);
    const uint32_t barriers = shared + S::BARRIERS_AT;
    if (threadIdx.x == 0) {
        const int joint = work_of<S>(l).counts.w;
        for (int stage = 0; stage < S::STAGES; ++stage) {
            barrier_init(S::full(barriers, stage), 1);
            barrier_init(S::empty(barriers, stage), joint ? 4 * S::WARPGROUPS : 4);
        }
        for (int group = 0; group < S::WARPGROUPS; ++group) {
            barrier_init(S::full_q(barriers, group), 1);
            barrier_init(S::empty_q(barriers, group), 1);
        }
        barrier_init_fence();
    }
    const int short_by = (S::BN - l.p.box_rows) * 32;  // words
    for (int i = threadIdx.x; i < S::STAGES * S::CHUNKS * short_by; i += S::THREADS) {
        const uint32_t chunk = i / short_by, word = i % short_by;
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared + S::RING_AT + chunk * S::BOX_CHUNK + l.p.box_rows * 128 + word * 4),
                     "r"(0)
                     : "memory");
    }
    if (short_by > 0) proxy_fence();
    note_rows<S>(l, shared + S::ROWS_AT);
    __syncthreads();

    if (threadIdx.x < 128) {
        registers_shrink<S::PRODUCER_REGISTERS>();
        if (threadIdx.x % 32 == 0) {
            if (threadIdx.x / 32 < S::WARPGROUPS)
                produce<S>(l, shared, barriers, threadIdx.x / 32);
            else
                produce_slabs<S>(l, shared, barriers);
        }
    } else {
        registers_grow<S::CONSUMER_REGISTERS>();
        consume_lists<S>(l, shared, barriers);
    }
}

}  // namespace stattn::attention_lists
