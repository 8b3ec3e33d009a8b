"""What a run's net sees, as sections of studies.report's page: each takes a folder.Run and returns HTML."""

import math

import numpy as np
import torch
from torch import Tensor

from checkpoints import LAYERS, layer_called
from checkpoints.run import KERNELS
from studies import look, page
from studies.common import new_figure
from studies.folder import BATCH, LeftOut, Run
from train import starting_net
from utils import Progress
from watch import Watch

FRAMES = 40  # of the moving picture at most
SHOWN = 6  # pictures in the sections that show some


# ---------------------------------------------------------------------------------------------- the paper's figure 3


def kernels(run: Run) -> str:
    """conv1's kernels, by column, how coloured they are, and how they came to be."""
    now = layer_called(run.net, "conv1").weight.detach().float().cpu().numpy()
    columns = run.checkpoint["config"].get("columns", 1)
    parts = np.split(now, columns)
    shown = [page.picture(page.grid(kernel_pictures(part), 12, scale=3), f"kernels-{number}", "Kernels of conv1")
             for number, part in enumerate(parts, 1)]
    said = f"How coloured, 0 (grey) to 1: {colours_of(parts)}. Random kernels have 0.67."
    if columns == 2:
        said += " First and second column: the paper's net has one half that is colour-blind and one that is not."
    return page.row(shown) + page.paragraph(said) + kernels_over_epochs(run, columns)


def kernels_over_epochs(run: Run, columns: int) -> str:
    try:
        kept = np.load(run.path / KERNELS, mmap_mode="r", allow_pickle=False).astype(np.float32)
        start = colours_of(np.split(kept[0], columns))
        chosen = np.linspace(0, len(kept) - 1, min(FRAMES, len(kept))).round().astype(int)
        frames = [page.grid(kernel_pictures(kept[number]), 12, scale=2) for number in chosen]
    except (OSError, ValueError, EOFError, IndexError):
        return page.paragraph(f"How they came to be is not known: the run has no {KERNELS}.")
    said = f"From the start (how coloured: {start}) to epoch {len(kept) - 1}, again and again:"
    return page.paragraph(said) + page.moving(frames, "kernels-over-epochs", "The kernels over epochs")


def colours_of(parts: list[np.ndarray]) -> str:
    return ", ".join(f"{look.saturation(part):.2f}" for part in parts)


def kernel_pictures(weights: np.ndarray) -> list[np.ndarray]:
    """Each kernel (3, k, k) as a picture, grey where it is 0, as bright as its own largest number allows."""
    largest = np.abs(weights).max((1, 2, 3), keepdims=True).clip(1e-12)
    return list((127.5 + 127.5 * weights / largest).round().astype(np.uint8).transpose(0, 2, 3, 1))


# ---------------------------------------------------------------------------------------------- the layers behind


def patches(run: Run) -> str:
    """For some kernels of conv2 to conv5 the nine training patches that excite them most."""
    rows, found = run.trained.rows, run.trained.strongest
    parts = [page.paragraph(f"Of each layer the kernels that stand out most, and the nine of {len(rows):,} training "
                       "pictures that excite each most, cut out at what it sees.")]
    for name, kernels in found.items():
        size, shown = look.receptive_field(run.net, name), []
        for kernel, places in kernels:
            crops = run.pictures("train", rows[[place[0] for place in places]])
            cuts = [look.cut(crop, size, *place[1:]) for crop, place in zip(crops, places, strict=True)]
            nine = page.grid([page.fitted(part, 48) for part in cuts], 3)
            drawn = page.picture(nine, f"patches-{name}-{kernel}", f"{name}, kernel {kernel}")
            shown.append(page.card(drawn, f"kernel {kernel}"))
        parts.append(page.heading(f"{name}: sees {min(size[0], run.size)} of {run.size} pixels") + page.cards(shown))
    return "".join(parts)


# ---------------------------------------------------------------------------------------------- the paper's figure 4


def guesses(run: Run) -> str:
    """Test pictures with their likeliest classes, some right and some wrong."""
    looked, generator = run.tested, np.random.default_rng(run.seed)
    right = (looked.probabilities.argmax(1) == looked.labels).numpy()
    parts = [page.paragraph(f"Pictures of the {run.split} split, drawn at random. Bold: the right class.")]
    for title, mine in (("Right", right), ("Wrong", ~right)):
        chosen = generator.permutation(np.flatnonzero(mine))[:SHOWN]
        shown = page.cards([guess(run, index) for index in chosen]) if len(chosen) else page.paragraph("None.")
        parts.append(page.heading(title) + shown)
    return "".join(parts)


def guess(run: Run, index: int) -> str:
    """A test picture with its five likeliest classes."""
    best = run.tested.probabilities[index].topk(min(5, len(run.classes)))
    truth = int(run.tested.labels[index])
    (pixels,) = run.pictures(run.split, run.tested.rows[[index]])
    bars = [page.bar(run.classes[number], chance, bold=number == truth)
            for number, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    drawn = page.picture(page.fitted(pixels, 128), f"guess-{index}", run.classes[truth])
    return page.card(drawn, run.classes[truth], "".join(bars))


def neighbours(run: Run) -> str:
    """The training pictures whose fc7 outputs are nearest, next to the nearest by pixels."""
    tested, trained = run.tested, run.trained
    by_net = look.nearest(tested.features, trained.features)
    by_pixels = look.nearest(*(small_pixels(run, split, looked.rows) for split, looked in (
        (run.split, tested), ("train", trained)
    )))
    chosen = np.random.default_rng(run.seed).permutation(len(tested.labels))[:5]
    rows = [trained.rows[near[chosen].flatten().numpy()] for near in (by_net, by_pixels)]
    parts = [run.pictures(run.split, tested.rows[chosen]), *(run.pictures("train", mine) for mine in rows)]
    blocks = [page.grid([page.fitted(pixels, 64) for pixels in part], len(part) // len(chosen)) for part in parts]
    gap = np.full((len(blocks[0]), 12, 3), 255, np.uint8)
    drawn = np.concatenate([blocks[0], gap, blocks[1], gap, blocks[2]], 1)
    net, pixels = (
        percent(*look.share_of_right(found, tested.labels, trained.labels)) for found in (by_net, by_pixels)
    )
    said = (f"{net} of the six nearest by fc7 have the right class, {pixels} of those by pixels: means "
            f"over {len(tested.labels):,} pictures of the {run.split} split with their 95% intervals, among "
            f"{len(trained.labels):,} training pictures.")
    return (page.paragraph("Each row: a picture, the six training pictures that are nearest by what fc7 gives, the six "
                           "that are nearest by their pixels.") +
            page.wide(page.picture(drawn, "neighbours", "Nearest neighbours")) + page.paragraph(said))


def percent(mean: float, half: float) -> str:
    return f"{mean:.1f}%" + ("" if math.isnan(half) else f" ± {half:.1f}")  # one picture has no interval


def small_pixels(run: Run, split: str, rows: np.ndarray) -> Tensor:
    """Pictures as rows of numbers, at most 64 x 64 pixels."""
    parts = []
    for start in range(0, len(rows), 500):
        crops = torch.from_numpy(run.pictures(split, rows[start : start + 500]).copy()).permute(0, 3, 1, 2).float()
        if run.size > 64:
            crops = torch.nn.functional.interpolate(crops, (64, 64), mode="area")
        parts.append(crops.flatten(1) / 255)
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------- where it looks


def where(run: Run) -> str:
    """Occlusion maps of test pictures that it gets right, and what deleting pixels in that order does."""
    looked = run.tested
    right = np.flatnonzero((looked.probabilities.argmax(1) == looked.labels).numpy())
    if not len(right):
        raise LeftOut("it gets no picture right")
    chosen = np.random.default_rng(run.seed).permutation(right)[:SHOWN]
    square, block, steps = run.size // 4, max(4, run.size // 16), 16
    side, maps, guided, random = -(-run.size // block), [], [], []
    with Progress("where it looks", len(chosen), "pictures") as progress:
        for index in chosen:
            (inputs,), truth = run.inputs(run.split, looked.rows[[index]]), int(looked.labels[index])
            fall, before = look.occlusion(run.net, inputs, truth, square, max(1, square // 4))
            orders = [np.random.default_rng((run.seed, index, n)).permutation(side**2) for n in range(3)]
            (pixels,), caption = run.pictures(run.split, looked.rows[[index]]), run.classes[truth]
            caption += f": probability {before:.2f}, falls by up to {fall.max():.2f}"
            maps.append(map_drawn(pixels, fall, index, caption))
            guided.append(look.deletion(run.net, inputs, truth, look.by_block(fall, block), block, steps))
            random.append(np.mean([look.deletion(run.net, inputs, truth, o, block, steps) for o in orders], 0))
            progress.update(1)
    guided, random = np.mean(guided, 0), np.mean(random, 0)
    said = (f"A grey square of {square} x {square} pixels is moved over pictures that it gets right. Bright: where "
            "covering costs most of the probability of the right class.")
    check = ("Covered in the map's order, most important first, the right class's probability is "
             f"{guided.mean():.2f} on average over the curve; at random {random.mean():.2f}.")
    return (page.paragraph(said) + page.cards(maps) + page.heading("Does the map mean something?") +
            deletion_drawn(guided, random) + page.paragraph(check))


def map_drawn(pixels: np.ndarray, fall: np.ndarray, number: int, caption: str) -> str:
    """A picture, and below it where covering costs how much."""
    from matplotlib import colormaps

    heat = (255 * colormaps["magma"]((fall / max(1e-6, fall.max())).clip(0))[:, :, :3]).round().astype(np.uint8)
    both = page.grid([page.fitted(pixels, 144), page.fitted(heat, 144)], 1)
    return page.card(page.picture(both, f"map-{number}", caption), caption)


def deletion_drawn(guided: np.ndarray, random: np.ndarray) -> str:
    figure = new_figure(5, 3.2)
    axes, share = figure.subplots(), np.linspace(0, 100, len(guided))
    axes.plot(share, guided, label="by the map, most important first")
    axes.plot(share, random, "--", label="at random")
    axes.set(xlabel="covered (% of the picture)", ylabel="probability of the class, mean", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return page.drawing(figure, "deletion", "Deletion curves")


# ---------------------------------------------------------------------------------------------- signals


def signals(run: Run) -> str:
    """Mean and spread of each layer's outputs, at the start and now."""
    rows = run.rows("train")  # by class in the store of a folder
    inputs = run.inputs("train", np.sort(np.random.default_rng(run.seed).permutation(rows)[:BATCH]))
    now, (start, note) = look.signals(run.net, inputs), start_of(run)
    before = look.signals(start, inputs) if start else {}
    lines = []
    for name in LAYERS:
        cells = [name]
        for found in (before, now):
            cells += [f"{v:.3g}" for v in found[name][:3]] + [f"{found[name][3]:.1f}%"] if found else [""] * 4
        lines.append(cells)
    four = ["mean", "std", "due to the picture", "dead"]
    head = ["layer", *(f"{when}: {what}" for when in ("start", "now") for what in four)]
    said = (f"Outputs of each layer before its activation, over {len(inputs)} training pictures. Due to the picture: a "
            "unit's standard deviation over pictures, root mean square over units; how much of it reaches fc6 at the "
            f"start decides whether a net leaves its plateau. Dead: units that give 0 or less for all pictures.{note}")
    return page.paragraph(said) + page.table(head, lines)


def start_of(run: Run) -> tuple[torch.nn.Module | None, str]:
    """The net as the run found it, or None and why it is not known."""
    if not run.arguments:
        return None, " What the net was at the start is not known: config.json is missing."
    if run.arguments.get("init"):
        return None, " The run started from other weights (--init), which are not looked at here."
    net = starting_net(run.started(), run.store, Watch(run.device))
    return net.to(run.device).eval(), ""
