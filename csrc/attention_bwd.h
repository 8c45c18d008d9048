// What the kernels of the attention backward share: where stats lie, and the plan of dK and dV.
#pragma once

#include <cstdint>

#include "attention_fwd.h"
#include "stattn.h"

namespace stattn::attention_bwd {

// Places in a head's rows of stats (AttentionStats).
struct StatsPlaces {
    int rows;               // of a head
    int height;             // lines of a frame
    int line, class_width;  // floats of a line of the last axis, and of a residue class
    int step;
    int video, after;       // where the rows of the video begin, and those behind it

    StatsPlaces() = default;
    explicit StatsPlaces(const AttentionStats& stats)
        : rows(static_cast<int>(stats.rows())),
          height(stats.shape[1]),
          line(static_cast<int>(stats.line_width())),
          class_width(stats.class_width()),
          step(stats.step),
          video(AttentionStats::padded(stats.before)),
          after(rows - AttentionStats::padded(stats.after)) {}

    __device__ __forceinline__ int at(int t, int h, int w) const {
        const int column = step == 1 ? w : w % step * class_width + w / step;
        return video + (t * height + h) * line + column;
    }
};

// Lists ascend, so blocks that begin together walk through the boxes of a head together, and find them in the L2 cache. They
// drift apart from wave to wave: a block begins when most of the wave before its own have asked for their last box, but does
// not wait for long, since where lists differ much in length no order helps. What it computes does not depend on it.
struct Together {
    int* done;   // what loaders have ended, GROUPS of a block; or null where the boxes of a head stay in the cache in any order
    int blocks;  // of a wave
    static constexpr int GROUPS = 2, PATIENCE = 100;  // cycles a box

    // bytes: of the boxes of a head.
    Together() = default;
    Together(const AttentionPlan& plan, int64_t bytes, int processors)
        : done(plan.together && bytes > 16 << 20 ? const_cast<int*>(plan.data) + plan.together : nullptr),
          blocks(processors) {}

#ifdef __CUDACC__
    __device__ __forceinline__ void begin(int boxes) const {
        if (!done) return;
        const int before = (static_cast<int>(blockIdx.x / blocks) * blocks - blocks / 10) * GROUPS;
        const int64_t start = clock64(), most = int64_t{boxes} * PATIENCE;
        int ended;
        while (true) {
            asm volatile("ld.relaxed.gpu.b32 %0, [%1];" : "=r"(ended) : "l"(done));
            if (ended >= before || clock64() - start > most) break;
            __nanosleep(200);
        }
    }
    __device__ __forceinline__ void end(int loaders) const {
        if (done) asm volatile("red.relaxed.gpu.add.u32 [%0], %1;" ::"l"(done), "r"(loaders) : "memory");
    }
#endif
};

// The plan of dK and dV has the records of the forward's (attention_fwd.h) with the roles of queries and keys exchanged:
//
// - Tiles are of keys: two slabs of at most 64 keys side by side on the axis `stacked`, for two warpgroups. Boxes are of
//   queries. AttentionPlan says `slab` of the one, `box` of the other, and shapes by their names. A mask is that of a key:
//   it has a bit for each query of a box.
// - All heads have the same tiles in the same order, that of memory locality; tiles of global keys are those of the lines.
// - A box is its first query (t, h, w) in the video and 0, or 0, 0, its first token among the global queries before and 1,
//   or 0, 0, its first token among those after and 2. The last word of a mask record of global queries is 0 always: what
//   is not real has stats by which its weights are 0. Or it is -2: all keys of the warpgroup see the box whole, and no
//   group is read.
// - A key tile that very many queries see is cut into pieces, each a tile of the plan with a part of the boxes, so that its
//   list does not keep one block busy for long. The last word of such a tile is its kind + 4 * (1 + number), where `number`
//   counts the pieces of a head: the block adds up dK and dV in fp32 and writes them to `partial`, [B][key heads][pieces]
//   [dK, dV][128 rows][head_dim], and a last pass sums the pieces of a tile in their order. At `split_record`, each tile in
//   pieces has two records: its first key and its kind, and its first piece, the number of pieces, 0, 0.

}  // namespace stattn::attention_bwd
