"""Your own card: a page to post, of a pipeline as it is and merged, each compiled and eager.

    python examples/benchmark.py --model FOLDER_OR_ID --sizes 512 768 1024 --ratios 0.25 0.5

A time is that of one step, the median of all but the first, which compiles where that is said, a minute or more. Memory
is the most that PyTorch held on a CUDA device meanwhile. The bound is what merging would gain if time went with FLOPs
alone. Merging pays most at large sizes.
"""

import argparse
import inspect
import itertools
import platform
import statistics
import time
from typing import Any

import diffusers
import tiny
import torch
from diffusers import AutoPipelineForText2Image

import tome_fx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--sizes", type=int, nargs="+", metavar="PIXELS", help="sides of the image; without it, the model's own"
)
parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5], help="shares of the tokens to remove")
parser.add_argument("--batch", type=int, default=1, help="images at once")
parser.add_argument("--merge-block", action="store_true", help="merge around whole blocks rather than attention")
args = tiny.parse(parser)
if args.steps < 2:
    parser.error(f"--steps must be at least 2, for the first one compiles; got {args.steps}")
if 0 in args.ratios:
    parser.error("--ratios must be above 0, for the stock model is measured anyway; got 0")
gpu = torch.device(args.device).type == "cuda"
accelerated = torch.device(args.device).type != "cpu"

pipe = AutoPipelineForText2Image.from_pretrained(args.model or tiny.stable_diffusion(), torch_dtype=args.dtype)
if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
    parser.error(f"--model must be of a pipeline with callback_on_step_end, to time it by; got {type(pipe).__name__}")
pipe.to(args.device)
pipe.set_progress_bar_config(disable=True)
part = "unet" if hasattr(pipe, "unet") else "transformer"
stock = getattr(pipe, part)
made_for = getattr(pipe, "default_sample_size", None) or stock.config.sample_size  # latents along a side


def measure(model: Any, size: int) -> tuple[float, float, float | None]:
    """Milliseconds of a step, seconds of the first one, and GiB on the GPU, of the pipeline with this model in it."""
    setattr(pipe, part, model)
    times = [time.perf_counter()]

    def ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if accelerated:
            torch.accelerator.synchronize(args.device)
        times.append(time.perf_counter())
        return tensors

    if gpu:
        torch.cuda.reset_peak_memory_stats(args.device)
    options = {"height": size, "width": size, "num_images_per_prompt": args.batch, "output_type": "latent"}
    pipe("a red circle", num_inference_steps=args.steps, callback_on_step_end=ended, **options)
    steps = [after - before for before, after in itertools.pairwise(times)]
    memory = torch.cuda.max_memory_allocated(args.device) / 2**30 if gpu else None
    return 1000 * statistics.median(steps[1:]), steps[0], memory


device = torch.cuda.get_device_name(args.device) if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
print(f"{args.model or 'tiny'}, {args.dtype}, batch {args.batch}, merge_block={args.merge_block}")
print(f"{device}; torch {torch.__version__}, diffusers {diffusers.__version__}, tome_fx {tome_fx.__version__}")
print(f"{'px':>6} {'model':<22} {'ms':>9} {'over compile':>13} {'bound':>7} {'first, s':>9} {'GiB':>6}")
for size in args.sizes or [made_for * pipe.vae_scale_factor]:
    side = size // pipe.vae_scale_factor
    torch._dynamo.reset()  # so that a size does not count as a recompile of the one before
    yardstick = None
    for ratio, compiled in itertools.product((0, *args.ratios), (True, False)):
        name = (f"merged {ratio:g}" if ratio else "stock") + (" + compile" if compiled else "")
        print(f"{size:>6} {name:<22}", end="", flush=True)  # before it is measured, which may take minutes
        model = tome_fx.transform(stock, ratio, merge_block=args.merge_block) if ratio else stock
        bound = f"{tome_fx.explain(model, side, side).bound:.2f}x" if ratio else "-"
        try:
            ms, first, memory = measure(torch.compile(model, fullgraph=True) if compiled else model, size)
        except torch.OutOfMemoryError:
            print(" out of memory")
            torch.cuda.empty_cache()
            continue
        if not ratio and compiled:
            yardstick = ms
        gain = f"{yardstick / ms:.2f}x" if yardstick else "-"
        print(f" {ms:>9.2f} {gain:>13} {bound:>7} {first:>9.1f} {'-' if memory is None else f'{memory:.2f}':>6}")
