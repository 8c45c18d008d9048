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
