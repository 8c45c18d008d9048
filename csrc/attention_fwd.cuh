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
//
// Which boxes a tile visits: without a plan, all keys in a line. With one (attention_fwd.h), a list of boxes, of which
// those come first that not every row sees whole: of these each row has a mask, the AND of a mask for every axis.
#pragma once

#include "attention_products.cuh"
#include "attention_store.cuh"

namespace stattn::attention_fwd {

// The producer.

// The place of box `number` of a line of `boxes`: a last box that is not whole comes first, so that only the first one
// has keys to be masked.
template <int BN>
__device__ __forceinline__ int line_start(int number, int boxes, bool ragged) {
    return (ragged ? (number == 0 ? boxes - 1 : number - 1) : number) * BN;
}

// Brings a box of keys or values.
template <typename S>
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, uint32_t full, uint32_t bytes, int t, int h,
                                         int w, int x) {
    barrier_expect(full, bytes);
#pragma unroll
    for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
        copy_in(to + chunk * S::BOX_CHUNK, map, full, EVICT_LAST, 64 * chunk, w, h, t, x);
}

// Loads boxes of keys and values as they are named. K runs one box ahead of V, as the consumers do.
template <typename S>
struct KeyLoader {
    const Parameters& p;
    uint32_t shared, barriers;
    Turn k_turn, v_turn;
    int k_x, v_x;          // of the tile's head
    int t, h, w, line;     // of the box whose values are still to come
    bool waiting = false;  // whether there is one

    __device__ __forceinline__ void start(const Tile& tile) {
        const int head = tile.head / p.queries_per_key;
        k_x = tile.batch * p.k_x.batch + head * p.k_x.head;
        v_x = tile.batch * p.v_x.batch + head * p.v_x.head;
    }

    // in_line: the box is one of the line of all tokens.
    __device__ __forceinline__ void visit(int box_t, int box_h, int box_w, int in_line) {
        barrier_wait(S::empty_k(barriers, k_turn.stage), k_turn.parity ^ 1);
        const CUtensorMap* map = S::PLANNED && in_line ? &p.k_line : &p.k_map;
        load_box<S>(shared + S::K_AT + k_turn.stage * S::BOX, map, S::full_k(barriers, k_turn.stage), p.box_bytes,
                    box_t, box_h, box_w, k_x);
        k_turn.advance();
        finish();
        t = box_t, h = box_h, w = box_w, line = in_line, waiting = true;
    }

    __device__ __forceinline__ void finish() {
        if (!waiting) return;
        barrier_wait(S::empty_v(barriers, v_turn.stage), v_turn.parity ^ 1);
        const CUtensorMap* map = S::PLANNED && line ? &p.v_line : &p.v_map;
        load_box<S>(shared + S::V_AT + v_turn.stage * S::BOX, map, S::full_v(barriers, v_turn.stage), p.box_bytes, t,
                    h, w, v_x);
        v_turn.advance();
        waiting = false;
    }
};

template <typename S>
__device__ __forceinline__ void produce_keys(const Parameters& p, uint32_t shared, uint32_t barriers) {
    KeyLoader<S> loader{p, shared, barriers};
    for (int index = blockIdx.x; index < p.tiles; index = next_tile<S>(p, index)) {
        const Tile tile = tile_at<S>(p, index);
        loader.start(tile);
        if constexpr (S::PLANNED) {
            for (int number = 0; number < tile.boxes; ++number) {
                const int4 box = record_at(p, tile.first_box + number);
                loader.visit(box.x, box.y, box.z, box.w);
            }
        } else {
            const bool ragged = p.keys % S::BN != 0;
            for (int number = 0; number < tile.boxes; ++number)
                loader.visit(0, 0, line_start<S::BN>(number, tile.boxes, ragged), 0);
        }
        loader.finish();
    }
}

// Brings the queries, each warpgroup's rows as soon as it has stored the output of its last tile from there.
template <typename S>
__device__ __forceinline__ void produce_queries(const Parameters& p, uint32_t shared, uint32_t barriers) {
    uint32_t parity = 0;
    for (int index = blockIdx.x; index < p.tiles; index = next_tile<S>(p, index)) {
        const Tile tile = tile_at<S>(p, index);
        const int x = tile.batch * p.q_x.batch + tile.head * p.q_x.head;
        const bool line = S::PLANNED && tile.kind != VIDEO;
        const CUtensorMap* map = line ? &p.q_line[tile.kind - BEFORE] : &p.q_map;
        for (int group = 0; group < S::WARPGROUPS; ++group) {
            barrier_wait(S::empty_q(barriers, group), parity ^ 1);
            barrier_expect(S::full_q(barriers, group), line ? S::SLAB : p.slab_bytes);
            const Corner corner = corner_of<S>(p, tile, group);
#pragma unroll
            for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
                copy_in(shared + S::Q_AT + group * S::SLAB + chunk * S::SLAB_CHUNK, map, S::full_q(barriers, group),
                        EVICT_FIRST, 64 * chunk, corner.w, corner.h, corner.t, x);
        }
        parity ^= 1;
    }
}

// The consumers.

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

// Finds the rows' new greatest scores, and the factors of what was summed up to now. Returns whether one moved.
// MASKED: a row may have no score but -inf.
template <bool MASKED, int COUNT>
__device__ __forceinline__ bool find_tops(const float (&scores)[COUNT], const Rows& rows, float (&top)[2],
                                          float (&factor)[2], float c) {
    bool moved = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        top[half] = fmaxf(rows.top[half], row_max(scores, half) * c);
        const float origin = MASKED && top[half] == -INFINITY ? 0.0f : top[half];
        factor[half] = exp2_approx(rows.top[half] - origin);
        moved |= top[half] != rows.top[half];
    }
    return moved;
}

template <int COUNT>
__device__ __forceinline__ void rescale(float (&out)[COUNT], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) out[i] *= factor[i / 2 % 2];
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

// Where a warpgroup finds what it works on; descriptors are those of the first stage.
struct Operands {
    uint64_t q, k, v;
    uint32_t barriers;
    int group;
    bool elected;  // one thread of each warp
    float c;
};

// The first box, or the first after boxes that were left out: its scores turn into weights. `turn` is that of the box.
// MASKED: `record` is that of the box's masks.
template <typename S, bool MASKED>
__device__ __forceinline__ void begin(const Parameters& p, const Operands& at, Turn& turn, float (&scores)[S::BN / 2],
                                      float (&out)[S::D / 2], uint32_t (&weights)[S::BN / 16][4], Rows& rows,
                                      int4 record) {
    barrier_wait(S::full_k(at.barriers, turn.stage), turn.parity);
    issue_square<S>(scores, at.q, at.k + turn.stage * (S::BOX / 16));
    BoxMask<S> mask;
    if constexpr (MASKED) mask.load(p, at.barriers, record);
    mma_wait<0>();
    pin(scores);
    if (at.elected) barrier_arrive(S::empty_k(at.barriers, turn.stage));
    if constexpr (MASKED) mask.apply(scores);
    if constexpr (!S::PLANNED) {
        const int ragged = p.keys % S::BN;
        if (ragged) mask_end(scores, ragged);
    }
    float top[2], factor[2];
    find_tops<true>(scores, rows, top, factor, at.c);
    weigh<true, typename S::Element>(scores, weights, rows, top, factor, at.c);
    if constexpr (S::PLANNED) rescale(out, factor);
    turn.advance();
}

// One box in the steady state: scores of this box and output of the one before are computed together.
template <typename S, bool MASKED>
__device__ __forceinline__ void step(const Parameters& p, const Operands& at, Turn& turn, float (&scores)[S::BN / 2],
                                     float (&out)[S::D / 2], uint32_t (&weights)[S::BN / 16][4], Rows& rows,
                                     int4 record) {
    const Turn v_turn = turn.before();
    barrier_wait(S::full_k(at.barriers, turn.stage), turn.parity);
    barrier_wait(S::full_v(at.barriers, v_turn.stage), v_turn.parity);
    if constexpr (!MASKED) named_sync(turn_barrier(at.group), 256);
    issue_square<S>(scores, at.q, at.k + turn.stage * (S::BOX / 16));
    issue_weighted<S>(out, weights, at.v + v_turn.stage * (S::BOX / 16));
    if constexpr (!MASKED) named_arrive(turn_barrier(at.group == S::WARPGROUPS - 1 ? 0 : at.group + 1), 256);
    BoxMask<S> mask;
    if constexpr (MASKED) mask.load(p, at.barriers, record);
    mma_wait<1>();
    pin(scores);
    if (at.elected) barrier_arrive(S::empty_k(at.barriers, turn.stage));
    if constexpr (MASKED) mask.apply(scores);

    float top[2], factor[2];
    const bool moved = find_tops<MASKED>(scores, rows, top, factor, at.c);
    mma_wait<0>();
    pin(out);
    if (at.elected) barrier_arrive(S::empty_v(at.barriers, v_turn.stage));
    weigh<MASKED, typename S::Element>(scores, weights, rows, top, factor, at.c);
    if (__any_sync(0xFFFFFFFF, moved)) rescale(out, factor);
    turn.advance();
}

// The output of the last box, or of the last before boxes that are left out. `turn` is that of the box behind it.
template <typename S>
__device__ __forceinline__ void finish(const Operands& at, Turn turn, float (&out)[S::D / 2],
                                       const uint32_t (&weights)[S::BN / 16][4]) {
    const Turn v_turn = turn.before();
    barrier_wait(S::full_v(at.barriers, v_turn.stage), v_turn.parity);
    issue_weighted<S>(out, weights, at.v + v_turn.stage * (S::BOX / 16));
    mma_wait<0>();
    pin(out);
    if (at.elected) barrier_arrive(S::empty_v(at.barriers, v_turn.stage));
}

// Lets a box pass that none of the warpgroup's rows sees.
template <typename S>
__device__ __forceinline__ void leave_out(const Operands& at, Turn& turn) {
    barrier_wait(S::full_k(at.barriers, turn.stage), turn.parity);
    if (at.elected) barrier_arrive(S::empty_k(at.barriers, turn.stage));
    barrier_wait(S::full_v(at.barriers, turn.stage), turn.parity);
    if (at.elected) barrier_arrive(S::empty_v(at.barriers, turn.stage));
    turn.advance();
}

// Fills the values of global tokens that are not real with 0 once they have come: a weight of 0 does not make up for a NaN.
// Each warpgroup does it before it reads them, whatever the others do: they write the same. `turn` is that of the box,
// `box` its number among those of global keys.
template <typename S>
__device__ __forceinline__ void clear_unreal(const Operands& at, uint32_t values, Turn turn, int box) {
    constexpr int WORDS = BoxMask<S>::WORDS;
    const uint32_t noted = at.barriers + S::VALID + box * WORDS * 4;
    barrier_wait(S::full_v(at.barriers, turn.stage), turn.parity);
    const int part = threadIdx.x % 8;  // of the 16-byte words of a row
#pragma unroll 1
    for (int row = threadIdx.x % 128 / 8; row < S::BN; row += 16) {
        uint32_t real;
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(real) : "r"(noted + row / 32 * 4));
        if (real >> row % 32 & 1) continue;
#pragma unroll
        for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(values + turn.stage * S::BOX +
                                                                          chunk * S::BOX_CHUNK + row * 128 + part * 16),
                         "r"(0)
                         : "memory");
    }
    proxy_fence();
    named_sync(store_barrier(at.group), 128);
}

template <typename S>
__device__ __forceinline__ void consume(const Parameters& p, uint32_t shared, uint32_t barriers) {
    Operands at;
    // A shuffle tells the compiler that this is the same in the whole warp: descriptors then stay in uniform registers.
    at.group = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128 - 1, 0);
    at.elected = threadIdx.x % 32 == 0;
    at.barriers = barriers;
    at.c = p.scale_log2;
    const uint32_t slab = shared + S::Q_AT + at.group * S::SLAB;
    at.q = operand(slab, 16);
    at.k = operand(shared + S::K_AT, 16);
    at.v = operand(shared + S::V_AT, S::BOX_CHUNK);

    Turn turn;
    uint32_t q_parity = 0;
    if (at.group == S::WARPGROUPS - 1) named_arrive(turn_barrier(0), 256);
    for (int index = blockIdx.x; index < p.tiles; index = next_tile<S>(p, index)) {
        float scores[S::BN / 2];
        float out[S::D / 2];
        uint32_t weights[S::BN / 16][4];
        Rows rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
#pragma unroll
        for (int i = 0; i < S::D / 2; ++i) out[i] = 0.0f;

        barrier_wait(S::full_q(barriers, at.group), q_parity);
        q_parity ^= 1;
        if constexpr (S::PLANNED) {
            const Tile tile = tile_at<S>(p, index);
            if (tile.kind == NONE) return;
            const int boxes = tile.boxes, masked = tile.masked;
            const int first_mask = tile.first_mask + at.group * masked;
            bool started = false;  // whether there are weights whose output is still to come
            // Warpgroups leave out boxes of their own here, so they do not take turns.
#pragma unroll 1
            for (int number = 0; number < masked; ++number) {
                const int4 record = record_at(p, first_mask + number);
                if (record.w < 0) {
                    if (started) finish<S>(at, turn, out, weights);
                    started = false;
                    leave_out<S>(at, turn);
                } else if (started) {
                    step<S, true>(p, at, turn, scores, out, weights, rows, record);
                } else {
                    begin<S, true>(p, at, turn, scores, out, weights, rows, record);
                    started = true;
                }
                if (record.w > 0) clear_unreal<S>(at, shared + S::V_AT, turn.before(), record.w - 1);
            }
            int number = masked;
            if (!started && number < boxes) {
                named_sync(turn_barrier(at.group), 256);  // a turn like that of the others
                named_arrive(turn_barrier(at.group == S::WARPGROUPS - 1 ? 0 : at.group + 1), 256);
                begin<S, false>(p, at, turn, scores, out, weights, rows, {});
                started = true;
                ++number;
            }
#pragma unroll 1
            for (; number < boxes; ++number) step<S, false>(p, at, turn, scores, out, weights, rows, {});
            if (started) finish<S>(at, turn, out, weights);
        } else {
            begin<S, false>(p, at, turn, scores, out, weights, rows, {});
#pragma unroll 1
            for (int number = 1; number < p.boxes; ++number)
                step<S, false>(p, at, turn, scores, out, weights, rows, {});
            finish<S>(at, turn, out, weights);
        }
        store<S>(p, tile_at<S>(p, index), out, rows, slab, S::empty_q(barriers, at.group), at.group);
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
    if (S::PLANNED && p.box_rows < S::BN) clear_behind_boxes<S>(p, shared + S::V_AT, STAGES * S::CHUNKS);
    if (S::PLANNED && p.valid) note_valid<S>(p, barriers + S::VALID);
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
