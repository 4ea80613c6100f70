"""Draw docs/idea.svg, the figure of the README: ``python docs/idea.py``."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

BLUE, ORANGE, GREY = "#1f5fa8", "#d9731a", "#808080"


def draw_minima(ax):
    """Draw two minima of the same depth and the loss on new data, higher at the sharp one."""
    w = np.linspace(-3.4, 3.4, 600)

    def loss(x):
        sharp = 1 - np.exp(-(((x + 1.7) / 0.28) ** 2))
        flat = 1 - np.exp(-(((x - 1.2) / 1.1) ** 2))
        return np.minimum(sharp, flat)

    ax.plot(w, loss(w), color="black", label="training loss")
    ax.plot(w, loss(w - 0.3), color=GREY, ls="--", label="loss on new data")
    for x, name, color in ((-1.7, "sharp", ORANGE), (1.2, "flat", BLUE)):
        ax.annotate(
            "",
            (x, loss(np.array([x - 0.3]))[0]),
            (x, 0.0),
            arrowprops={"arrowstyle": "->", "color": color, "lw": 2.5},
        )
        ax.text(x, -0.13, f"{name} minimum", color=color, ha="center")
    ax.set(ylim=(-0.22, 1.25), xticks=[], yticks=[], xlabel="weights", ylabel="loss")
    ax.legend(loc="upper center", frameon=False, ncols=2)
    ax.set_title("Flat minima lose less on new data")


def draw_transfer(ax):
    """Draw a ball in the full weight space and the line of weights that B can reach."""
    angle = np.linspace(0, 2 * np.pi, 200)
    ax.fill(np.cos(angle), np.sin(angle), color=BLUE, alpha=0.08, lw=0)
    ax.plot(np.cos(angle), np.sin(angle), color=BLUE, lw=1)
    direction = np.array([np.cos(0.45), np.sin(0.45)])
    worst = np.array([np.cos(1.05), np.sin(1.05)])
    ax.plot(*np.outer([-1.45, 1.45], direction).T, color=GREY, lw=1.2)
    ax.text(*(1.5 * direction), "$W_0 + s\\,B\\,A$,  any $B$", color=GREY, va="center")
    reached = direction * (worst @ direction)
    arrow = {"arrowstyle": "-|>", "lw": 2.2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", worst, (0, 0), arrowprops={**arrow, "color": BLUE})
    ax.annotate("", reached, (0, 0), arrowprops={**arrow, "color": ORANGE})
    ax.plot(*np.array([worst, reached]).T, color=GREY, ls=":", lw=1.4)
    ax.text(worst[0] - 0.06, worst[1] + 0.1, "$E_W = \\rho\\,\\hat{G}/\\|\\hat{G}\\|$", color=BLUE)
    ax.text(reached[0] + 0.1, reached[1] - 0.3, "$s\\,E_B\\,A$", color=ORANGE)
    ax.text(-0.12, -0.16, "$W$")
    ax.text(0, -0.9, "radius $\\rho$, full weight space", ha="center", color=BLUE, fontsize=9)
    ax.set(xlim=(-1.5, 2.9), ylim=(-1.15, 1.35), aspect="equal")
    ax.axis("off")
    ax.set_title("The worst direction of W, carried by one factor")


def main():
    plt.rcParams.update({"svg.hashsalt": "eflat", "svg.fonttype": "path"})
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    draw_minima(axes[0])
    draw_transfer(axes[1])
    for spine in ("top", "right"):
        axes[0].spines[spine].set_visible(False)
    fig.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})
    plt.close(fig)


if __name__ == "__main__":
    main()
