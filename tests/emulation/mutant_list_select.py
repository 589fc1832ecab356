"""Faults of the selection kernels, as in mutant_list.py."""

from __future__ import annotations

from mutant_list import Mutant, barriers, instead

SELECT = "select.cuh"
MUTANTS = [
    *barriers("select.cuh"),
    Mutant(
        "counts of a block without atomics",
        SELECT,
        instead("atomicAdd(&counts[search.bucket(key)], 1u);", "counts[search.bucket(key)] += 1u;"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "counts of all blocks without atomics",
        SELECT,
        instead(
            "if (counts[i]) atomicAdd(&tally.counts[i], counts[i]);",
            "tally.counts[i] += counts[i];",
        ),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "counts are not cleared between digits",
        SELECT,
        instead("  narrow(tally);\n  clear(tally.counts);\n", "  narrow(tally);\n"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "finished blocks are counted on between digits",
        SELECT,
        instead("atomicInc(&done, blocks - 1)", "atomicAdd(&done, 1u)"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "no fence before a block counts as finished",
        SELECT,
        instead(
            "    __threadfence();  // after the barrier: for the writes of the whole block\n", ""
        ),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "no fence after a block counts as finished",
        SELECT,
        instead("for the next digit\n    __threadfence();", "for the next digit"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "the last block but one continues the search",
        SELECT,
        instead("blocks - 1) == blocks - 1;", "blocks - 1) == blocks - 2;"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "a selection ignores NaN",
        SELECT,
        instead("return number_in(kNanKey<R>, 1);", "return 0;"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "one warp has the smallest key",
        SELECT,
        instead("if (threadIdx.x % 32 == 0 && mine", "if (threadIdx.x == 0 && mine"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "keys of an incomplete pack in one access",
        SELECT,
        instead("if (packed && at + kPack <= count)", "if (packed && at < count)"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "no bound on single elements of a selection",
        SELECT,
        instead("at + i < count ? in[k][at + i] : S{}", "in[k][at + i]"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "keys after the end of a row",
        SELECT,
        instead("at + i < count ? key : kNoKey<R>", "key"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "the last packs of keys are not counted",
        SELECT,
        instead("if (p >= used) return;", "if (p + 1 >= used) return;"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "two packs of keys are the same",
        SELECT,
        instead(
            "const int p = (first + u) * threads + x, at = p * kPack;",
            "const int p = first * threads + x, at = p * kPack;",
        ),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "too few threads hold the keys of a row",
        SELECT,
        instead("while (threads * kHeld < args.cols)", "while (threads * kHeld * 2 < args.cols)"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "a sum over more threads than a row has",
        SELECT,
        instead(
            "for (int offset = width / 2; offset > 0; offset /= 2) mine +=",
            "for (int offset = 16; offset > 0; offset /= 2) mine +=",
        ),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "rows of a warp stop their search on their own",
        SELECT,
        instead("while (__any_sync(~0u, searches()))", "while (searches())"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "threads without a row write the last one",
        SELECT,
        instead("if (x == 0 && mine == row)", "if (x == 0)"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "the next key is the key itself",
        SELECT,
        instead("held.smallest_from(key + 1)", "held.smallest_from(key)"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "sums up to a thread leave out its warp",
        SELECT,
        instead("if (lane == 31) by_warp", "if (lane == 30) by_warp"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "sums up to a thread count its warp twice",
        SELECT,
        instead("w < warp; ++w", "w <= warp; ++w"),
        ("x0_quantile", "f32"),
    ),
]
