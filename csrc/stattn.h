// What the CUDA files offer to the bindings: raw pointers, 64-bit sizes and strides, a stream. No torch in here.
//
// Every entry launches on the given stream of the current device, does not synchronise, launches nothing when there is
// nothing to do, and returns the error of the launch.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace stattn {

// csrc/copy.cu: dst[i] = src[i] for 0 <= i < bytes; the two must not overlap. Any alignment.
cudaError_t copy_bytes(const void* src, void* dst, int64_t bytes, cudaStream_t stream);

// A tensor [B, N, heads, D] with unit last stride; the strides are in elements.
struct Strided {
    const void* data;
    int64_t batch, token, head;
};

// csrc/attention_fwd.cu: out = softmax(scale q k^T) v for every head, and the natural-log LSE of its rows. Addresses and
// strides are multiples of 16 bytes, scale is positive, there is at least one key. config: an entry of the file's list.
//
// Without a plan every query sees every key. With one (csrc/attention_fwd.h), tokens are those of boxes (t, h, w), and a
// tile of queries is one slab of at most 64 tokens for each warpgroup, side by side on the axis `stacked`. The tokens of
// slabs and key boxes lie `steps` apart on each axis, at most 8 where there is more than one.
struct AttentionPlan {
    const int32_t* data;
    int q_shape[3], k_shape[3], slab[3], box[3], steps[3];
    int stacked, tiles;  // tiles: of each head
    // Global tokens before and after the video, whether q holds them too, and its tiles of them.
    int before, after, q_globals, line_tiles, line_record;
    const uint8_t* valid;  // [B, before + after], which of them are real; or null
    // Tiles in pieces: the pieces of each head, the tiles that they are of; and in csrc/attention_bwd.h where these are listed.
    int pieces, split_tiles, split_record;
    // Of lists in the backward: where in the plan a number lies, 0 at first, by which blocks begin together; or 0.
    int together;
};
struct AttentionForward {
    Strided q, k, v, out;
    float* lse;  // [B, heads, queries], or null
    int batch, heads, key_heads, head_dim, queries, keys;
    float scale;
    bool bf16;  // else fp16
    int config;
    const AttentionPlan* plan;  // or null
    // For tiles in pieces: B * heads * (pieces * 192 * (head dimension, 64 or 128, + 1) + 3 * split_tiles) numbers; or null.
    float* partial;
    // Of a plan whose boxes lie in frames of a grid: the frame that each key slot holds, and room for the plan of slots.
    const int32_t* frames;  // [slots], -1 for none; or null
    int grid_frames;
    int32_t* placed_plan;
    int64_t plan_size;      // int32
};
cudaError_t attention_forward(const AttentionForward& call, cudaStream_t stream);

// csrc/attention_direct.cpp: keeps a call that was checked, on a device, for callers that know it by this number. What it
// says of where tensors begin, and of the stream, they say anew each time.
uint64_t attention_keep(const AttentionForward& call, int device);

// Block lists on the device, of tiles of a video without global tokens. Tiles of queries are cut into slabs, tiles of keys
// into boxes, of at most 64 tokens each, whose extents divide theirs; three slabs side by side on the axis `stacked` are
// computed together. scratch: 4-byte numbers for the lists as they are read, whose size attention_lists.cu tells.
struct AttentionLists {
    const int32_t *count, *index;  // [samples, heads, query tiles (, most)] with strides in elements
    const uint8_t* partial;        // like index; or null
    int64_t count_stride[3], index_stride[4], partial_stride[4];
    int samples, heads, most;      // samples, heads: 1 stands for all
    int shape[3], q_tile[3], k_tile[3], slab[3], box[3], stacked;
    const int32_t* tables;  // what the masks of partial tiles allow, from stattn/ops/_cuda_lists.py
    int products;           // of the mask
    int32_t* scratch;       // aligned to 16 bytes
    int64_t scratch_size;
};

// csrc/attention_lists.cu: the same as attention_forward for the pairs of tiles that are listed. `call` has no plan.
cudaError_t attention_forward_lists(const AttentionForward& call, const AttentionLists& lists, cudaStream_t stream);

// What the backward reads of its queries, as it was prepared: two numbers in fp32 for each row, first the LSE to base 2 of
// all rows, +inf where a row sees nothing, then rowsum(dout out) - dlse of all rows: [2][B * heads][rows()].
//
// Rows of a head: those of the global queries before the video, those of the video as lines of the last axis, those after;
// each part and each line is padded with 0 to a multiple of 4. Where the last axis has a step, its residue classes lie one
// after the other in a line, padded each. Without a plan, or with a q that has no global tokens, before and after are 0.
struct AttentionStats {
    float* data;
    int before, after, shape[3], step;  // shape: (T, H, W) of the queries
    static constexpr int padded(int count) { return (count + 3) / 4 * 4; }
    int class_width() const { return padded((shape[2] + step - 1) / step); }  // of a residue class
    int64_t line_width() const { return int64_t{class_width()} * step; }
    int64_t rows() const { return padded(before) + shape[0] * line_width() * shape[1] + padded(after); }
};

// csrc/attention_bwd_prepare.cu: fills the stats of a call. Strides of dout and out are multiples of 16 bytes.
struct AttentionPrepare {
    Strided out, dout;
    const float *lse, *dlse;  // [B, heads, queries]; dlse may be null
    AttentionStats stats;
    int batch, heads, head_dim, queries;
    bool bf16;
};
cudaError_t attention_backward_prepare(const AttentionPrepare& call, cudaStream_t stream);

// The gradients, from stats that were prepared. Addresses and strides are multiples of 16 bytes, scale is positive, there
// are queries and keys.
struct AttentionBackward {
    Strided q, k, v, dout;
    Strided dq, dk, dv;  // contiguous
    AttentionStats stats;
    float* dq_sum;   // sums of dq in fp32, dq_sum_size() of them; or null
    float* partial;  // of key tiles in pieces, as csrc/attention_bwd.h says; or null
    int room;        // without a plan: the pieces that partial has room for
    int batch, heads, key_heads, head_dim, queries, keys;
    float scale;
    bool bf16;
    int config;
    const AttentionPlan* plan;  // or null
};

// csrc/attention_bwd_dq.cu: dq alone, in an order that depends on each row alone. There is a plan, the forward's.
cudaError_t attention_backward_dq(const AttentionBackward& call, cudaStream_t stream);

// How the queries of a head lie in boxes that do not overlap: of the global ones before the video, in a line, of the video
// (t, h, w), and of those after.
struct QueryBoxes {
    int shape[3], box[3], before, after;

    __host__ __device__ int rows() const { return box[0] * box[1] * box[2]; }
    __host__ __device__ int in_line(int tokens) const { return (tokens + rows() - 1) / rows(); }
    __host__ __device__ int along(int axis) const { return (shape[axis] + box[axis] - 1) / box[axis]; }
    __host__ __device__ int count() const { return in_line(before) + along(0) * along(1) * along(2) + in_line(after); }
};
inline QueryBoxes query_boxes(const AttentionBackward& call) {
    if (!call.plan) return {{1, 1, call.queries}, {1, 1, call.head_dim > 64 ? 64 : 128}, 0, 0};
    const AttentionPlan& plan = *call.plan;
    return {{plan.q_shape[0], plan.q_shape[1], plan.q_shape[2]},
            {plan.box[0], plan.box[1], plan.box[2]},
            plan.q_globals ? plan.before : 0,
            plan.q_globals ? plan.after : 0};
}

// dq_sum holds 8,192 numbers for each box, in the order of the registers that they come from; or with a plan whose boxes
// do not begin at multiples of their extents, [B * heads][queries][head_dim]. config: 1 for boxes of a plan, else 0; or 2,
// without a plan, where key tiles add in their order: behind the sums then lie 4 integers, and 2 for each box. Without sums
// it is 1 for a plan of lists, else 0, and there is a plan.
inline int64_t dq_sum_size(const AttentionBackward& call) {
    const int64_t heads = int64_t{call.batch} * call.heads;
    if (call.plan && call.config == 0) return heads * call.queries * call.head_dim;
    const int64_t boxes = heads * query_boxes(call).count();
    return boxes * 8192 + (call.config == 2 ? 4 + 2 * boxes : 0);
}

// csrc/attention_bwd_kv.cu: dk and dv; and, where there is a dq_sum, in it the sums of dq / scale. Their order is fixed
// with a config of 2 only.
// The plan is that of csrc/attention_bwd.h.
cudaError_t attention_backward_kv(const AttentionBackward& call, cudaStream_t stream);

// csrc/attention_bwd_sums.cu: dk and dv from the partial sums of tiles in pieces, which attention_backward_kv asks for; and
// dq from dq_sum.
// Without a plan, `tiles` key tiles behind the `whole` first ones are in so many pieces each.
struct AttentionCut {
    int whole, tiles, pieces;
};
cudaError_t attention_backward_sum(const AttentionBackward& call, const AttentionCut& cut, cudaStream_t stream);
cudaError_t attention_backward_finish(const AttentionBackward& call, const QueryBoxes* boxes, cudaStream_t stream);

// A plan of the backward that is written on the device from the block lists of one sample. Tiles of the rows, those of
// queries or, with by_key, of keys, are cut into slabs, and a tile of the plan is `slabs` of them side by side on the axis
// `stacked`; those of the columns are cut into parts, each in one box.
struct AttentionListPlan {
    const int32_t *count, *index;  // [list heads, query tiles (, most)] with strides in elements
    const uint8_t* partial;        // like index; or null
    int64_t count_stride[2], index_stride[3], partial_stride[3];
    int heads, list_heads, most, q_tiles, k_tiles;  // list_heads: 1 stands for all
    bool by_key, short_boxes;                       // short_boxes: no box is full
    int slabs, stacked, tiles;                      // tiles: of the plan, for each head
    int shape[3], slab[3];
    int columns[3], column_tile[3], part[3], parts[3], boxes[3];  // tiles on each axis, extents, parts of a tile and in all
    const int32_t* corners;   // [tiles, 4], the first record of each tile
    const int32_t* rows;      // [tiles, slabs], the tile of the lists that each slab is of, or -1
    const int32_t* patterns;  // what is seen of boxes on an axis: [boxes], by whole tiles, then [slabs, boxes], by partial ones
    int pattern_at[3], pattern_count[3];
    const int32_t* groups;    // masks for all patterns of t, h and w
    int64_t groups_bytes;
    int groups_record, first_group, first_record;  // in the plan: where the groups lie, their first number, the tiles
    int32_t* plan;
    int32_t* scratch;
    int64_t scratch_size;
};

// csrc/attention_bwd_lists.cu
cudaError_t attention_backward_lists(const AttentionListPlan& lists, cudaStream_t stream);

}  // namespace stattn
