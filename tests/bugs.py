"""The bugs that ``planted_bugs.py`` plants: what each replaces, and the tests that must see it."""

from __future__ import annotations

from typing import NamedTuple

REFERENCE = "stattn/reference/attention.py"
RUNS = "tests/test_attention_runs.py::test_results_and_gradients_are_within_rule_1"
PLANS = "tests/test_plan.py::test_tables_show_what_the_mask_allows_in_parts_of_the_grid_and_both_ways"
ATTENTION = "tests/test_attention_kernels.py::test_results_and_gradients_are_within_rule_1"
AWKWARD = "tests/test_probes.py::test_every_constructor_is_seen_as_it_is_on_awkward_grids"
HOSTS = (
    "tests/test_integrations.py::test_every_family_equals_a_dense_masked_run_on_two_grids_and_undo_restores_it_bitwise"
)


class Bug(NamedTuple):
    """What to replace in which file, and the tests that must see it."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


BUGS = (
    Bug(
        "window-one-too-wide-on-one-side",
        "stattn/masks/named.py",
        "last = first + size - 1\n",
        "last = np.minimum(first + size, members - 1)\n",
        ("tests/test_masks.py::test_every_constructor_allows_what_it_means_on_awkward_grids[window]",),
    ),
    Bug(
        "causal-window-sees-the-next-key",
        "stattn/masks/named.py",
        "first, last = np.maximum(leader - size + 1, 0), place\n",
        "first, last = np.maximum(leader - size + 1, 0), np.minimum(place + 1, members - 1)\n",
        ("tests/test_masks.py::test_no_causal_window_sees_a_later_key",),
    ),
    Bug(
        "walk-loses-the-last-key-of-a-window",
        "stattn/reference/walk.py",
        "(keys <= hi.max()))\n",
        "(keys < hi.max()))\n",
        (f"{AWKWARD}[window]",),
    ),
    Bug(
        "walk-ignores-residue-classes",
        "stattn/reference/walk.py",
        "mask = (lo[:, None] <= y) & (y <= hi[:, None]) & ((y - queries[:, None]) % rule.step == 0)\n",
        "mask = (lo[:, None] <= y) & (y <= hi[:, None])\n",
        (f"{AWKWARD}[window]",),
    ),
    Bug(
        "last-partial-tile-dropped",
        "stattn/reference/tiles.py",
        "for i, j in _pairs(cut)]\n        for each in",
        "for i, j in _pairs(cut[:-1] if len(cut) > 2 else cut)]\n        for each in",
        (f"{AWKWARD}[window]",),
    ),
    Bug(
        "h-and-w-swapped",
        "stattn/reference/walk.py",
        "return (((t[:, None] * extent[1] + h)[:, :, None]) * extent[2] + w).reshape(-1)\n",
        "return (((t[:, None] * extent[2] + w)[:, :, None]) * extent[1] + h).reshape(-1)\n",
        (f"{AWKWARD}[window]",),
    ),
    Bug(
        "lse-with-the-wrong-sign",
        REFERENCE,
        "put_lse(lse, job, part_lse)\n",
        "put_lse(lse, job, -part_lse)\n",
        (f"{AWKWARD}[spatial]",),
    ),
    Bug(
        "scale-skipped",
        REFERENCE,
        "return _cpu_forward(q, k, v, 0.0, False, attn_mask=bias, scale=scale)\n",
        "return _cpu_forward(q, k, v, 0.0, False, attn_mask=bias, scale=1.0)\n",
        ("tests/test_attention.py::test_float64_equals_the_formula_for_every_mask",),
    ),
    Bug(
        "only-dq-unmasked",
        REFERENCE,
        "        put(dq, job, grads[0])\n",
        "        rows = [take(x, job.batch, job.q, job.heads) for x in (dout, out, lse.transpose(1, 2)[..., None])]\n"
        "        rows.append(_backward(rows[0], None, qg, kg, vg, rows[1], rows[2][..., 0], None, problem.scale)[0])\n"
        "        put(dq, job, rows[3])\n",
        (f"{AWKWARD}[window]",),
    ),
    Bug(
        "slab-read-from-its-start",
        "stattn/reference/gather.py",
        "return found[:, job.first : job.first + job.k.shape[1]]",
        "return found[:, : job.k.shape[1]]",
        ("tests/test_gather.py::test_keys_in_boxes_and_slabs_are_those_gathered_one_by_one",),
    ),
    Bug(
        "tail-of-a-short-tile-unmasked",
        "stattn/reference/walk.py",
        "strict=True)], -1, np.int64)\n",
        "strict=True)], 0, np.int64)\n",
        ("tests/test_probes.py::test_block_lists_are_walked_as_listed",),
    ),
    Bug(
        "strides-of-dout-ignored",
        REFERENCE,
        "            take(dout, job.batch, job.q, job.heads),\n",
        "            take(dout.as_strided(out.shape, out.stride()), job.batch, job.q, job.heads),\n",
        ("tests/test_attention.py::test_the_gradient_of_the_output_may_have_any_strides",),
    ),
    Bug(
        "global-tokens-seen-twice",
        REFERENCE,
        "    k = torch.cat([job.k, rows.expand(job.k.shape[0], -1)], dim=1)\n",
        "    rows = torch.cat([rows, rows])\n    k = torch.cat([job.k, rows.expand(job.k.shape[0], -1)], dim=1)\n",
        ("tests/test_probes.py::test_global_tokens_are_seen_beside_every_mask",),
    ),
    Bug(
        "invalid-global-tokens-seen",
        REFERENCE,
        "    if valid is None or count == 0:\n",
        "    if valid is not None or count == 0:\n",
        ("tests/test_attention.py::test_invalid_global_tokens_are_neither_keys_nor_queries",),
    ),
    Bug(
        "union-counts-a-key-twice",
        "stattn/reference/walk.py",
        "        for earlier in range(product):\n",
        "        for earlier in range(product - 1):\n",
        ("tests/test_probes.py::test_overlapping_products_count_no_key_twice",),
    ),
    Bug(
        "merge-of-nothing-is-not-a-number",
        REFERENCE,
        "    unseen = torch.isneginf(stacked).all(dim=0)\n",
        "    unseen = torch.zeros_like(stacked[0], dtype=torch.bool)\n",
        ("tests/test_attention.py::test_merging_nothing_changes_nothing",),
    ),
    Bug(
        "grouped-heads-taken-in-turn",
        REFERENCE,
        "    kv_heads = job.heads // (q.shape[2] // k.shape[2])\n",
        "    kv_heads = job.heads % k.shape[2]\n",
        ("tests/test_attention.py::test_grouped_heads_equal_repeated_ones",),
    ),
    Bug(
        "modulate-forgets-one-plus-scale",
        "stattn/reference/modulate.py",
        "y = y * (1 + spread(scale.to(dtype), x.shape[1]))\n",
        "y = y * spread(scale.to(dtype), x.shape[1])\n",
        ("tests/test_modulate.py::test_modulate_equals_the_norm_of_torch_scaled_and_shifted",),
    ),
    Bug(
        "gate-rounded-before-the-sum",
        "stattn/reference/gate.py",
        "    return (x.to(dtype) + update).to(x.dtype)\n",
        "    return x + update.to(x.dtype)\n",
        ("tests/test_gate.py::test_the_sum_is_rounded_once_and_the_product_is_not",),
    ),
    Bug(
        "unpatchify-swaps-ph-and-pw",
        "stattn/reference/patchify.py",
        "video = video.reshape(tokens.shape[0], t, h, w, pt, ph, pw, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)\n",
        "video = video.reshape(tokens.shape[0], t, h, w, pt, pw, ph, channels).permute(0, 7, 1, 4, 2, 6, 3, 5)\n",
        ("tests/test_patchify.py::test_unpatchify_puts_feature_pt_ph_pw_c_where_it_belongs",),
    ),
    Bug(
        "rotation-turns-the-wrong-way",
        "stattn/reference/qk_norm_rope.py",
        "a, b = a * cos - b * sin, a * sin + b * cos\n",
        "a, b = a * cos + b * sin, b * cos - a * sin\n",
        ("tests/test_qk_norm_rope.py::test_the_rotation_is_a_complex_product_and_leaves_global_tokens_alone",),
    ),
    Bug(
        "known-region-blended-the-wrong-way",
        "stattn/reference/denoise.py",
        "following = torch.where(m == 1, following, torch.where(m == 0, kept, blend))\n",
        "following = torch.where(m == 0, following, torch.where(m == 1, kept, blend))\n",
        ("tests/test_denoise.py::test_a_known_region_without_noise_is_kept_bitwise_and_shields_from_nan",),
    ),
    Bug(
        "patch-read-with-the-stride-of-another-axis",
        "kernels/_patches.py",
        "        return (c * steps[1] + t * steps[2] + h * steps[3]) * VEC + w * steps[4], t, h, w\n",
        "        return (c * steps[1] + t * steps[2] + h * steps[4]) * VEC + w * steps[4], t, h, w\n",
        ("tests/test_patchify_kernels.py::test_small_integers_give_the_exact_tokens_and_gradients[cpu-dtype1]",),
    ),
    Bug(
        "long-float32-sums-in-one-run",
        "kernels/patchify_bwd.py",
        "            if (e0 + BLOCK_E) % SPAN == 0:\n",
        "            if e0 + BLOCK_E >= E:\n",
        (
            "tests/test_patchify_kernels.py::test_long_float32_sums_do_not_lose_small_terms_beside_a_huge_one[features-results1-cpu]",
        ),
    ),
    Bug(
        "modulate-kernel-forgets-one-plus-scale",
        "kernels/_rows.py",
        "(1.0 + scales[i]) * factor[i])\n",
        "scales[i] * factor[i])\n",
        ("tests/test_modulate_kernels.py::test_every_number_of_tokens_around_a_tile_is_right[cpu]",),
    ),
    Bug(
        "modulate-kernel-forgets-the-mean-of-the-variance",
        "kernels/_rows.py",
        "    rstd = tl.rsqrt(divide(sum_row(square), C) + eps)\n",
        "    rstd = tl.rsqrt(divide(sum_row(square), C) + mean * mean + eps)\n",
        ("tests/test_modulate_kernels.py::test_an_offset_of_a_thousand_and_an_outlier_cost_no_digits[layer-cpu]",),
    ),
    Bug(
        "gate-of-the-first-frame-in-all",
        "kernels/gate.py",
        "group_address(gate, group, groups, gate_b, gate_r) + cols\n        shared",
        "group_address(gate, group // groups * groups, groups, gate_b, gate_r) + cols\n        shared",
        (
            "tests/test_modulate_kernels.py::test_the_sum_is_that_of_eager_pytorch_bit_by_bit_in_both_kernels[cpu-dtype1]",
        ),
    ),
    Bug(
        "rope-kernel-swaps-h-and-w",
        "kernels/qk_norm_rope.py",
        "video // w_extent % h_extent, video % w_extent\n",
        "video % w_extent % h_extent, video // w_extent % h_extent % w_extent\n",
        ("tests/test_qk_norm_rope_kernels.py::test_every_config_is_right[cpu-0]",),
    ),
    Bug(
        "rope-backward-keeps-its-place-over-global-tokens",
        "kernels/qk_norm_rope_bwd.py",
        "    w += inside.to(tl.int32)\n",
        "    w += 1\n",
        (
            "tests/test_qk_norm_rope_kernels.py::"
            "test_a_program_that_walks_on_to_the_next_sample_keeps_its_place[per head-cpu]",
        ),
    ),
    Bug(
        "means-of-the-whole-tile-at-the-edge",
        "kernels/qk_norm_rope_means.py",
        "a, b = sums[j][0] / count, sums[j][1] / count",
        "a, b = sums[j][0] / (TILE_T * TILE_H * TILE_W), sums[j][1] / count",
        ("tests/test_qk_norm_rope_means.py::test_every_config_is_right[0-cpu]",),
    ),
    Bug(
        "last-layer-forgets-how-far-the-pivot-is-off",
        "kernels/modulate_linear.py",
        "(product - mean[:, None] * factor[None, :]) * rstd",
        "product * rstd",
        ("tests/test_modulate_linear.py::test_every_config_is_right[0-cpu]",),
    ),
    Bug(
        "velocity-with-the-wrong-sign",
        "kernels/denoise.py",
        "    p = tl.where(to_output == 0, 0.0, to_output * o)\n",
        "    p = tl.where(to_output == 0, 0.0, -to_output * o)\n",
        (
            "tests/test_denoise_kernels.py::test_every_step_is_as_close_to_float64_as_eager_code[cpu-state0-output0-euler]",
        ),
    ),
    Bug(
        "higher-tile-wins-a-tie",
        "kernels/select.py",
        "            among = above + rank < most\n",
        "            among = above + tl.sum(equal) - rank <= most\n",
        ("tests/test_select_kernels.py::test_triton_lets_the_lower_tile_win_a_tie[interpreter]",),
    ),
    Bug(
        "plan-lets-a-row-see-one-column-more",
        "stattn/plan.py",
        "np.where(none, 0, hi - first)\n",
        "np.where(none, 0, np.minimum(hi - first + 1, last - first))\n",
        (f"{PLANS}[(3, 5, 4)]", f"{ATTENTION}[window]"),
    ),
    Bug(
        "plan-loses-a-guard-bit",
        "stattn/plan.py",
        "width = (2 * columns.extent[axis]).bit_length()",
        "width = (columns.extent[axis] // 2).bit_length()",
        (f"{PLANS}[(3, 5, 4)]", f"{ATTENTION}[window]"),
    ),
    Bug(
        "plan-cuts-a-union-apart-one-column-too-late",
        "stattn/plan.py",
        "np.minimum(mine.hi, theirs.lo - 1)), mine.step))\n",
        "np.minimum(mine.hi, theirs.lo)), mine.step))\n",
        ("tests/test_plan.py::test_products_cut_apart_allow_what_their_union_allows",),
    ),
    Bug(
        "keys-behind-a-listed-tile-are-near",
        "kernels/_walk.py",
        "256), 0) - 1) << (20 - 10 * axis)\n",
        "256), 0)) << (20 - 10 * axis)\n",
        (f"{ATTENTION}[lists of tiles beyond the grid]",),
    ),
    Bug(
        "last-partial-box-dropped",
        "kernels/_walk.py",
        "return tl.cdiv(length[0], box[0]) * tl.cdiv(length[1], box[1]) * tl.cdiv(length[2], box[2])\n",
        "return tl.cdiv(length[0], box[0]) * tl.cdiv(length[1], box[1]) * (length[2] // box[2])\n",
        (f"{ATTENTION}[full]",),
    ),
    Bug(
        "offsets-of-long-samples-in-32-bits",
        "kernels/attention.py",
        "if tokens * x.stride(1) + dim >= 2**31:\n",
        "if tokens * x.stride(1) + dim >= 2**32:\n",
        ("tests/test_attention_kernels.py::test_offsets_of_64_bits_are_taken_when_one_sample_is_that_long",),
    ),
    Bug(
        "sign-of-the-scale-ignored",
        "kernels/attention.py",
        '"SIGN": int(np.sign(problem.scale)),\n',
        '"SIGN": 1,\n',
        (f"{ATTENTION}[negative scale]",),
    ),
    Bug(
        "only-the-mask-of-triton-dq-is-wrong",
        "kernels/attention_bwd.py",
        "(tl.zeros([ROWS, WIDTH], tl.float32),), walk, rows, exists,",
        "(tl.zeros([ROWS, WIDTH], tl.float32),), walk, (rows[0], rows[1], tl.where(exists, rows[2] // 2, 0)), exists,",
        (f"{ATTENTION}[window]",),
    ),
    Bug(
        "strides-of-dout-ignored-in-delta",
        "kernels/attention_bwd.py",
        "right = walking.load_rows(dout, row, dout_token, exists, DIM, WIDTH)",
        "right = walking.load_rows(dout, row, heads * DIM, exists, DIM, WIDTH)",
        ("tests/test_attention_kernels.py::test_the_gradient_of_the_output_may_have_any_strides",),
    ),
    Bug(
        "lse-with-the-wrong-sign-in-dk-and-dv",
        "kernels/attention_bwd.py",
        "p = tl.exp2(scores * context.exponent - value[None, :])\n",
        "p = tl.exp2(scores * context.exponent + value[None, :])\n",
        (f"{ATTENTION}[full]",),
    ),
    Bug(
        "runs-that-touch-are-lost",
        "stattn/plan_runs.py",
        "joined[-1] = (joined[-1][0], joined[-1][1] + length)\n",
        "joined[-1] = (joined[-1][0], joined[-1][1])\n",
        (f"{RUNS}[frame causal]",),
    ),
    Bug(
        "one-column-of-a-run-is-seen-twice",
        "kernels/attention_runs.py",
        'scores = tl.where((start + tl.arange(0, COLUMNS) >= turn * COLUMNS)[None, :], scores, -float("inf"))\n',
        'scores = tl.where((start + tl.arange(0, COLUMNS) >= turn * COLUMNS - 1)[None, :], scores, -float("inf"))\n',
        (f"{RUNS}[spatial]",),
    ),
    Bug(
        "weights-of-a-run-meet-values-of-the-next-box",
        "kernels/attention_runs.py",
        "last = tl.minimum(tl.maximum(turn - 1, 0) * COLUMNS, length - COLUMNS)\n",
        "last = tl.minimum(turn * COLUMNS, length - COLUMNS)\n",
        (f"{RUNS}[full]",),
    ),
    Bug(
        "ring-cache-overwrites-a-sink",
        "stattn/cache.py",
        "return frame if frame < self.sinks else self.sinks + (frame - self.sinks) % self.window\n",
        "return frame % self.slots\n",
        ("tests/test_rollout.py::test_chunks_through_a_cache_equal_one_pass_over_all_frames[2-4-1-cross]",),
    ),
    Bug(
        "later-chunks-see-a-noisy-past",
        "stattn/rollout.py",
        "        if first + count < frames:\n",
        "        if first + count < 0:\n",
        ("tests/test_rollout.py::test_a_rollout_equals_recomputing_every_chunk[2-None-0-0-1.0]",),
    ),
    Bug(
        "dense-layers-one-too-many",
        "stattn/dit.py",
        "layer < dense_layers",
        "layer <= dense_layers",
        ("tests/test_dit.py::test_the_first_layers_may_be_dense[cross]",),
    ),
    Bug(
        "host-tokens-on-the-wrong-side",
        "stattn/integrations/_layers.py",
        'if self.extra == "before" else',
        'if self.extra != "before" else',
        ("tests/test_integrations.py::test_tokens_of_conditions_beside_the_grid_are_global[ltx-before]",),
    ),
    Bug(
        "host-angles-of-h-and-w-swapped",
        "stattn/integrations/_layers.py",
        "(each[:, 0, 0], each[0, :, 0], each[0, 0])[axis]",
        "(each[:, 0, 0], each[0, 0], each[0, :, 0])[axis]",
        (f"{HOSTS}[wan]",),
    ),
    Bug(
        "host-padded-text-taken-for-real",
        "stattn/integrations/_processors.py",
        "[:, -text:].bool()",
        "[:, :text].bool()",
        (f"{HOSTS}[hunyuanvideo]",),
    ),
    Bug(
        "host-masks-of-the-other-process",
        "stattn/integrations/diffusers.py",
        "mask[self.rank * part : (self.rank + 1) * part]",
        "mask[: part]",
        ("tests/test_two_processes.py::test_processes_share_tokens_heads_and_their_masks[wan2.2-ti2v-ulysses]",),
    ),
    Bug(
        "host-ring-asks-for-another-part",
        "stattn/integrations/diffusers.py",
        "boxes(grid, self.ring_rank * part, (self.ring_rank + 1) * part)",
        "boxes(grid, 0, part)",
        ("tests/test_two_processes.py::test_processes_share_tokens_heads_and_their_masks[wan2.2-ti2v-ring]",),
    ),
    Bug(
        "host-steps-counted-by-calls",
        "stattn/integrations/_layers.py",
        "        if now != self.time:\n",
        "        if True:\n",
        ("tests/test_integrations.py::test_the_first_steps_are_dense_by_the_changes_of_the_timestep",),
    ),
    Bug(
        "warm-calls-do-not-mind-where-tensors-begin",
        "stattn/ops/_attention_memo.py",
        "if aligned == (not (q_at | k_at | v_at) & 15):",
        "if places:",
        ("tests/test_attention_memo.py::test_where_a_tensor_starts_is_part_of_the_choice",),
    ),
    Bug(
        "warm-calls-forget-whether-gradients-are-wanted",
        "stattn/ops/_attention_memo.py",
        "modes = deterministic, ranges.enabled(), _is_grad_enabled()",
        "modes = deterministic, ranges.enabled()",
        ("tests/test_attention_memo.py::test_a_warm_call_is_recalled",),
    ),
    Bug(
        "cuda-queries-of-a-region-see-every-key-where-the-first-does",
        "stattn/ops/_cuda_plan.py",
        "(rule.lo[row] <= first).all() and (rule.hi[row] >= end).all()",
        "rule.lo[row][0] <= first and rule.hi[row][0] >= end",
        (
            "tests/test_attention_cuda_plan.py::test_queries_that_see_every_key_of_a_region_are_planned_and_run_as_dense",
        ),
    ),
    Bug(
        "cuda-boxes-partly-seen-go-without-masks",
        "stattn/ops/_cuda_tiles.py",
        "np.maximum(visits.whole_to // extent, whole_from))\n",
        "np.maximum(-(-visits.whole_to // extent), whole_from))\n",
        ("tests/test_attention_cuda_plan.py::test_a_plan_visits_each_allowed_pair_once_and_no_other[64-shape2]",),
    ),
    Bug(
        "cuda-unions-count-what-two-parts-allow-twice",
        "stattn/ops/_cuda_mask_table.py",
        "seen if first == 0 else ~seen\n",
        "seen if first == 0 else np.int32(-1)\n",
        ("tests/test_attention_cuda_plan.py::test_a_pair_that_several_parts_of_a_union_allow_is_visited_once[shape0]",),
    ),
    Bug(
        "cuda-lists-see-the-next-key",
        "stattn/ops/_cuda_lists.py",
        "(lo <= key) & (key <= hi) & ",
        "(lo <= key) & (key <= hi + 1) & ",
        ("tests/test_attention_lists.py::test_slabs_boxes_and_masks_make_up_what_lists_allow[shape1-q_tile1-k_tile1]",),
    ),
    Bug(
        "cuda-gradients-let-all-video-keys-be-seen-by-globals",
        "stattn/ops/_cuda_bwd_plan.py",
        'line if line.see == "all" else None',
        "line",
        ("tests/test_attention_cuda_bwd.py::test_global_tokens_are_planned_beside_the_video[True-3-200]",),
    ),
    Bug(
        "cuda-gradients-count-what-two-parts-allow-twice",
        "stattn/ops/_cuda_bwd_plan.py",
        "products[:number]",
        "products[:0]",
        ("tests/test_attention_cuda_bwd.py::test_parts_of_unions_that_overlap_count_no_pair_twice",),
    ),
    Bug(
        "cuda-gradients-copy-statistics-from-anywhere",
        "stattn/ops/_cuda_tiles.py",
        "multiples = box if apart else (1, 1, unit)",
        "multiples = box if apart else (1, 1, 1)",
        ("tests/test_attention_cuda_bwd.py::test_parts_of_a_grid_are_planned_as_parts",),
    ),
    Bug(
        "cuda-pieces-of-key-tiles-lose-a-box",
        "stattn/ops/_cuda_bwd_plan.py",
        "size = -(-count[self.tile] // split.parts[tile])",
        "size = count[self.tile] // split.parts[tile]",
        ("tests/test_attention_cuda_bwd.py::test_long_lists_are_cut_into_pieces",),
    ),
    Bug(
        "cuda-listed-tiles-see-beyond-their-end",
        "stattn/ops/_cuda_bwd_lists.py",
        "inside = column < length ",
        "inside = column < length + 1 ",
        ("tests/test_attention_cuda_bwd.py::test_masks_of_listed_tiles_show_what_rows_see_of_boxes",),
    ),
    Bug(
        "cuda-pieces-of-a-list-lose-a-box",
        "stattn/ops/_cuda_tiles.py",
        "return [*pieces, boxes - sum(pieces)]\n",
        "return [*pieces, boxes - sum(pieces) - 1]\n",
        ("tests/test_attention_cuda_plan.py::test_pieces_of_lists_cover_them_and_get_shorter",),
    ),
)
