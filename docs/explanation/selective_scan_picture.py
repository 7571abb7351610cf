"""Draws selective-scan.svg: the chunks of the scan, and the roofline of its forward pass.

python docs/explanation/selective_scan_picture.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

plt.switch_backend("svg")
plt.rcParams |= {"svg.hashsalt": "selective-scan", "font.size": 9}

DEVICES = {"TPU v5e": (0.82e12, 61e9 * 112), "H100": (3.35e12, 231e9 * 112)}
"""Bytes a second; operations a second: token-channels a second (spec 5.4) times 112 (16 exponentials, 96 others)."""


def chunks(axes) -> None:
    for i in range(4):
        x = 2.5 * i
        axes.add_patch(Rectangle((x, 2.4), 2.5, 0.7, facecolor="#dbe9f6", edgecolor="white"))
        axes.add_patch(Rectangle((x, 2.4), 0.28, 0.7, facecolor="#1f77b4"))
        for j in range(1, 8):
            axes.plot([x + 0.3125 * j] * 2, [2.4, 3.1], color="white", linewidth=0.8)
        axes.text(x + 1.3, 2.05, f"chunk {i + 1}", ha="center")
    axes.add_patch(Rectangle((5, 0.5), 2.5, 0.7, facecolor="#1f77b4"))
    for j in range(1, 8):
        axes.plot([5 + 0.3125 * j] * 2, [0.5, 1.2], color="white", linewidth=0.8)

    def arrow(start, end, colour):
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.4))

    arrow((0, 3.4), (10, 3.4), "#1f77b4")
    axes.text(0, 3.6, "forward: the state goes through, its value at each boundary is kept (dark)", color="#1f77b4")
    arrow((5.14, 2.4), (5.14, 1.22), "#1f77b4")
    arrow((10, 1.55), (7.55, 1.55), "#d62728")
    arrow((7.5, 0.25), (5, 0.25), "#d62728")
    arrow((4.95, 1.55), (2.5, 1.55), "#d62728")
    axes.text(7.65, 0.85, "chunk 3's states,\ncomputed again", color="#1f77b4", va="center")
    axes.text(0, -0.25, "backward: the adjoint walks back, chunk after chunk", color="#d62728")
    axes.set(xlim=(-0.2, 10.4), ylim=(-0.6, 4.1))
    axes.axis("off")


def roofline(axes) -> None:
    intensity = np.geomspace(0.5, 100, 200)
    for (name, (memory, arithmetic)), colour in zip(DEVICES.items(), ("#2ca02c", "#9467bd"), strict=True):
        axes.loglog(intensity, np.minimum(intensity * memory, arithmetic) / 1e12, color=colour, label=name)
    for label, bytes_moved, height in (("fused scan", 12.7, 0.16), ("states written, read", 12.7 + 128, 3.6)):
        at = 112 / bytes_moved
        axes.axvline(at, color="grey", linestyle=":", linewidth=1)
        axes.text(at * 0.97, height, label, rotation=90, va="bottom", ha="right", color="grey")
    axes.set(xlabel="operations per byte moved", ylabel="10¹² operations / s", title="Roofline, forward, float32")
    axes.set_ylim(0.1, 100)
    axes.legend(loc="lower right", frameon=False)


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1.9, 1), layout="constrained")
chunks(left)
roofline(right)
out = Path(__file__).with_name("selective-scan.svg")
figure.savefig(out, metadata={"Date": None})
print(out, out.stat().st_size)
