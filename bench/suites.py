"""What is asked of quality: suites of cases, the pairs of them that are compared, and those that we advise."""

from bench.cases import Case, options

KV = options(merge_queries=False)
FINEST, ALL_LEVELS = options(max_downsample="finest"), options(max_downsample=8)
KV_ALL_LEVELS = options(merge_queries=False, max_downsample=8)
WHOLE_FINEST, WHOLE_ALL_LEVELS = (options(merge_block=True, max_downsample=levels) for levels in ("finest", 8))
PER_BLOCK = options(share_match=False, max_downsample=8)
WHOLE, WHOLE_SMALL_TILES = options(merge_block=True), options(merge_block=True, tile=16)
WHOLE_PER_BLOCK = options(merge_block=True, share_match=False)
WHOLE_GRID, SMALL_TILES = options(tile=None), options(tile=16)
RATIOS = (0.25, 0.5, 0.75)

# Half of the steps unmerged, after the others or before them, and what saves as many FLOPs in all of them
LATE, EARLY = Case("tome_fx", 0, KV, ((0.5, 0.75),)), Case("tome_fx", 0.75, KV, ((0.5, 0),))
LATE_HALF = Case("tome_fx", 0, KV, ((0.5, 0.5),))
CONSTANT = Case("tome_fx", 0.38, KV)
MORE_LATE, MORE_EARLY = Case("tome_fx", 0.25, (), ((0.5, 0.75),)), Case("tome_fx", 0.75, (), ((0.5, 0.25),))
ATTENTION_LATE = Case("tome_fx", 0, (), ((0.5, 0.5),))
WHOLE_SOONER, WHOLE_MORE = Case("tome_fx", 0, WHOLE, ((0.25, 0.5),)), Case("tome_fx", 0, WHOLE, ((0.5, 0.75),))
WHOLE_LATE, WHOLE_EARLY = Case("tome_fx", 0, WHOLE, ((0.5, 0.5),)), Case("tome_fx", 0.5, WHOLE, ((0.5, 0),))

TODO, HIDIFFUSION = Case("todo", 0.75), Case("hidiffusion", 0.75)
YARDSTICK = Case("bf16")  # what moves an image no further is not to be seen
# What we advise: as near to stock as a bf16 UNet, the default, and what saves most, at all levels as in SDXL by default
POINTS = {
    "nearest": Case("tome_fx", 0.25, KV),
    "balanced": Case("tome_fx", 0.5),
    "fastest": Case("tome_fx", 0.5, WHOLE_ALL_LEVELS),
}

BESIDE = (Case("v0.1", 0.5), Case("tomesd", 0.5), TODO)  # what they are shown beside

SUITES: dict[str, tuple[Case, ...]] = {
    "all": (
        Case(),
        YARDSTICK,
        *(Case("v0.1", ratio) for ratio in RATIOS),
        *(Case("tome_fx", ratio) for ratio in (0.25, 0.75)),
        Case("tome_fx", 0.5, WHOLE_GRID),
        Case("tome_fx", 0.5, SMALL_TILES),
        *(Case("tome_fx", ratio, levels) for levels in (FINEST, ALL_LEVELS) for ratio in (0.25, 0.5)),
        Case("tome_fx", 0.5, PER_BLOCK),
        Case("tome_fx", 0.75, ALL_LEVELS),
        *(Case("tome_fx", ratio, KV) for ratio in (0.5, 0.75)),
        Case("tome_fx", 0.75, KV_ALL_LEVELS),
        *(Case("tome_fx", ratio, whole) for whole in (WHOLE_FINEST, WHOLE_ALL_LEVELS) for ratio in (0.25, 0.5)),
        *POINTS.values(),
        *(LATE, EARLY, CONSTANT, LATE_HALF, MORE_LATE, MORE_EARLY),
        *(Case("tomesd", ratio) for ratio in RATIOS),
        *(TODO, HIDIFFUSION),
    ),
    "points": (Case(), *POINTS.values(), *BESIDE),
    # what may depend on the size of the grid
    "large": (
        Case(),
        YARDSTICK,
        Case("v0.1", 0.5),
        *(Case("tome_fx", 0.5, tiles) for tiles in ((), WHOLE_GRID, SMALL_TILES)),
        Case("tome_fx", 0.5, KV),
        Case("tomesd", 0.5),
        *(TODO, HIDIFFUSION),
    ),
    # of a diffusion transformer, which has one level, and whose attention takes no keys and values of its own
    "transformer": (
        Case(),
        YARDSTICK,
        *(Case("tome_fx", ratio, whole) for whole in ((), WHOLE) for ratio in (0.25, 0.5)),
        *(Case("tome_fx", 0.5, tiles) for tiles in (WHOLE_GRID, SMALL_TILES, WHOLE_SMALL_TILES)),
        Case("tome_fx", 0.5, WHOLE_PER_BLOCK),
        *(WHOLE_LATE, WHOLE_EARLY, WHOLE_SOONER, WHOLE_MORE, ATTENTION_LATE),
    ),
}

# Two cases each, of which the first minus the second is told
QUESTIONS: tuple[tuple[str, Case, Case], ...] = (
    *(("`tome_fx` - `v0.1`", Case("tome_fx", ratio), Case("v0.1", ratio)) for ratio in RATIOS),
    ("tiles of 32 - whole grid", Case("tome_fx", 0.5), Case("tome_fx", 0.5, WHOLE_GRID)),
    ("tiles of 16 - whole grid", Case("tome_fx", 0.5, SMALL_TILES), Case("tome_fx", 0.5, WHOLE_GRID)),
    ("one match per stack - per block", Case("tome_fx", 0.5, ALL_LEVELS), Case("tome_fx", 0.5, PER_BLOCK)),
    *(
        ("all levels - finest", Case("tome_fx", ratio, ALL_LEVELS), Case("tome_fx", ratio, FINEST))
        for ratio in (0.25, 0.5)
    ),
    *(("keys and values - all", Case("tome_fx", ratio, KV), Case("tome_fx", ratio)) for ratio in (0.5, 0.75)),
    ("keys and values - all, of as many FLOPs", Case("tome_fx", 0.75, KV), Case("tome_fx", 0.5)),
    ("keys and values - `todo`", Case("tome_fx", 0.75, KV), TODO),
    ("keys and values, late - early", LATE, EARLY),
    ("keys and values, late - throughout", LATE, CONSTANT),
    ("keys and values, late - throughout", LATE_HALF, POINTS["nearest"]),
    ("more merged late - early", MORE_LATE, MORE_EARLY),
    *(
        ("whole blocks - attention, finest", Case("tome_fx", ratio, WHOLE_FINEST), Case("tome_fx", ratio, FINEST))
        for ratio in (0.25, 0.5)
    ),
    *(
        (
            "whole blocks - attention, all levels",
            Case("tome_fx", ratio, WHOLE_ALL_LEVELS),
            Case("tome_fx", ratio, ALL_LEVELS),
        )
        for ratio in (0.25, 0.5)
    ),
    *(("whole blocks - attention", Case("tome_fx", ratio, WHOLE), Case("tome_fx", ratio, ())) for ratio in (0.25, 0.5)),
    ("whole blocks, tiles of 16 - of 32", Case("tome_fx", 0.5, WHOLE_SMALL_TILES), Case("tome_fx", 0.5, WHOLE)),
    ("whole blocks, one match - one for each", Case("tome_fx", 0.5, WHOLE), Case("tome_fx", 0.5, WHOLE_PER_BLOCK)),
    ("whole blocks, late - early", WHOLE_LATE, WHOLE_EARLY),
    ("whole blocks, late - throughout", WHOLE_LATE, Case("tome_fx", 0.25, WHOLE)),
    ("whole blocks, from the middle - from a quarter", WHOLE_LATE, WHOLE_SOONER),
    ("whole blocks, late - attention, late", WHOLE_LATE, ATTENTION_LATE),
    *(("`tome_fx` - `tomesd`", Case("tome_fx", ratio), Case("tomesd", ratio)) for ratio in RATIOS),
    *(
        (f"`tome_fx` - `{peer.variant}`", Case("tome_fx", ratio), peer)
        for peer in (TODO, HIDIFFUSION)
        for ratio in (0.5, 0.75)
    ),
    ("nearest - `bf16`", POINTS["nearest"], YARDSTICK),
)
