"""Draws the charts of the documentation from the measured results.

python benchmarks/charts.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import RESULTS

IMAGES = Path(__file__).parent.parent / "docs" / "images"
LINES = {
    "separate models, fused Adam": "#b8860b",
    "modelbatch 0.1.0": "#8a8a96",
    "whole step in jax.jit": "#7a5195",
    "whole step in torch.compile": "#6a9a6a",
    "ModelBatch without engine": "#7fa8d0",
    "ModelBatch": "#1f5fa8",
    "ModelBatch, train_steps of 8, per step": "#d1495b",
}


def cost_per_model() -> Path:
    """Microseconds per model of a training step, over the number of models."""
    measured = json.loads((RESULTS / "step.json").read_text())
    rows = [r for r in measured["results"] if r["workload"].startswith("MLP 20-16-16-4")]
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    for name, colour in LINES.items():
        points = [
            (r["models"], r["variants"][name]["ms"] / r["models"] * 1e3)
            for r in rows
            if name in r["variants"]
        ]
        width = 2.2 if name.startswith("ModelBatch") else 1.3
        axes.plot(*zip(*points), "o-", color=colour, label=name, linewidth=width, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    counts = [row["models"] for row in rows]
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("models")
    axes.set_ylabel("µs per model and step")
    axes.set_title("MLP 20-16-16-4, B = 32, Adam: what one model costs", loc="left", fontsize=11)
    note = f"{measured['cpu']}, {measured['threads']} threads, torch {measured['torch']}"
    axes.text(1, -0.16, note, transform=axes.transAxes, ha="right", fontsize=7, color="#666666")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / "cost_per_model.png"
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


if __name__ == "__main__":
    print(cost_per_model())
