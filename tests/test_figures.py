"""The figures of docs/paper.md: their scripts find what the page says, and their optimizers are the real ones."""

import pytest

pytest.importorskip("matplotlib")

import json
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import optax

import convergence_area
import counterexamples
import reference

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SVG = "{http://www.w3.org/2000/svg}"
SIZES = {
    "small": 12.5,
    "soft": 12.0,
    "head": 13.0,
    "code": 14.0,
}  # of the classes in house.svg, the first that a text has
RATE, B1, B2, PERIOD = 0.03, 0.5, 0.99, 7
GRID = counterexamples.Grid(rates=(0.01, RATE), b1=(B1, 0.9), b2=(0.9, B2), periods=(4, PERIOD, 9))
POINT = (1, 0, 1, 1)


def quick(name: str, folder: Path) -> dict:
    subprocess.run([sys.executable, FIGURES / f"{name}.py", "--quick", "--out", folder], check=True)
    assert (folder / f"{name}.png").stat().st_size > 10_000
    assert (folder / f"{name}.md").read_text().startswith(("| ", "**"))
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
def test_convergence_area(tmp_path: Path) -> None:
    found = quick("convergence_area", tmp_path)
    for b1 in ("0.5", "0.9"):
        first, sparse = ({name: area[b1] for name, area in found[p]["area"].items()} for p in ("first", "sparse"))
        assert first["AdaShift"] == first["ACProp"] == 1.0
        assert max(first["RMSProp"], first["Adam"], first["AdaBelief"]) < 1.0
        assert sparse["ACProp"] >= sparse["AdaShift"]
        assert sparse["AdaShift"] < 1.0
        for problem in ("first", "sparse"):
            assert found[problem][convergence_area.ONLY_ADASHIFT][b1] == 0
    assert sparse["ACProp"] == 1.0
    assert found["first"]["area"]["ACProp"]["0"] == 0.0  # g_t - m_t is 0
    assert found["first step"]["first"]["AdaShift, first step taken"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("problem", convergence_area.PROBLEMS)
def test_a_larger_exponent_gives_back_what_the_clip_takes(problem: str) -> None:
    axes = {"first": range(11, 21, 3), "sparse": range(32, 41, 4)}[problem]
    grid = convergence_area.grids(quick=True)[problem]._replace(b1=(0.9,), periods=axes)
    for exponent, everywhere in ((0.25, False), (0.5, True)):
        optimizer = counterexamples.corner("ACProp", clip_exponent=exponent)
        distances = counterexamples.solve(convergence_area.PROBLEMS[problem], optimizer, grid, convergence_area.STEPS)
        assert convergence_area.converged(distances).all() == everywhere


@pytest.mark.slow
def test_trajectories(tmp_path: Path) -> None:
    first, sparse = quick("trajectories", tmp_path).values()
    assert max(first["AdaShift"], first["ACProp"], sparse["ACProp"]) < 0.01
    assert min(first["RMSProp"], first["Adam"], first["AdaBelief"]) > 1.0  # beyond the start, away from the optimum
    assert min(sparse["AdaShift"], sparse["RMSProp"]) > 0.9


@pytest.mark.slow
def test_explosion(tmp_path: Path) -> None:
    for problem, rate in quick("explosion", tmp_path).items():
        (_, plain), (_, clipped), _ = found = rate.items()
        assert plain["largest loss"] > 1000.0
        assert plain["largest step"] > 1.0
        bound = {"rosenbrock": 1e-4, "digits": 1e-3}[problem] * clipped["steps"] ** 0.25
        assert clipped["largest step"] <= bound * (1.0 + 1e-12)
        assert clipped["largest loss"] < 2.5
        assert clipped["last loss"] <= min(row["last loss"] for _, row in found)


def test_the_page_has_the_tables_of_the_full_run() -> None:
    found = json.loads((FIGURES / "convergence_area.json").read_text())
    assert (FIGURES / "convergence_area.md").read_text() == convergence_area.text(found) + "\n"
    for b1 in ("0.5", "0.9", "0.95", "0.99"):
        assert found["first"]["area"]["ACProp"][b1] == 1.0
        assert found["first"][convergence_area.ONLY_ADASHIFT][b1] == 0
    assert all(n == 0 for b1, n in found["sparse"][convergence_area.ONLY_ADASHIFT].items() if b1 != "0")
    # the page: the first step decides the first problem, the centre the sparse one
    first, sparse = found["first step"].values()
    assert first["AdaShift, first step taken"] == first["ACProp, as in its paper"] == 1.0
    assert max(first["AdaShift, as in its paper"], first["ACProp, first step left out"]) <= 0.9
    assert sparse["ACProp, as in its paper"] == sparse["ACProp, first step left out"] == 1.0
    assert sparse["AdaShift, as in its paper"] == sparse["AdaShift, first step taken"] < 0.93
    *_, longer = found["first problem by setting"].values()
    assert longer["AdaShift"] == longer["ACProp"] == 1.0
    assert max(longer["RMSProp"], longer["Adam"], longer["AdaBelief"]) < 0.9
    page = (FIGURES.parent / "paper.md").read_text()
    for name in ("convergence_area", "trajectories", "explosion"):
        assert f"figures/{name}.md" in page
        assert f"figures/{name}.png" in page
        assert f"python docs/figures/{name}.py" in page


def of_optax(transform: optax.GradientTransformation, slopes: list[float]) -> list[float]:
    state = transform.init(jnp.zeros(()))
    directions = []
    for slope in slopes:
        d, state = transform.update(jnp.asarray(slope), state)
        directions.append(float(d))
    return directions


def of_the_oracle(slopes: list[float], clip_exponent: float | None = None) -> list[float]:
    hyper = reference.Hyperparameters(1.0, b1=B1, b2=B2, clip_exponent=clip_exponent)
    steps = reference.trajectory(hyper, slopes, [0.0] * len(slopes), 2.0**-52)
    return [-float(step.update) for step in steps]


def of_adashift(slopes: list[float]) -> list[float]:
    # the average over all earlier gradients written out, normalized by its weights
    directions = [0.0]
    for t in range(1, len(slopes)):
        weights = [B2 ** (t - 1 - i) for i in range(t)]
        v = math.fsum(w * g * g for w, g in zip(weights, slopes[:t], strict=True)) / math.fsum(weights)
        directions.append(slopes[t] / (math.sqrt(v) + 1e-8))
    return directions


DIRECTIONS = {
    "RMSProp": lambda slopes: of_optax(optax.scale_by_rms(B2, eps=1e-8, eps_in_sqrt=False), slopes),
    "Adam": lambda slopes: of_optax(optax.scale_by_adam(B1, B2, eps=1e-8), slopes),
    "AdaBelief": lambda slopes: of_optax(optax.scale_by_belief(B1, B2), slopes),
    "AdaShift": of_adashift,
    "ACProp": of_the_oracle,
    "ACProp, clip 0.25": lambda slopes: of_the_oracle(slopes, 0.25),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizer"), counterexamples.OPTIMIZERS.items())
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_point_of_the_grid_is_the_optimizer_itself(
    name: str, optimizer: counterexamples.Optimizer, kind: str
) -> None:
    large = {"dense": float(PERIOD), "sparse": PERIOD / 2}[kind]
    slopes = [-1.0 if kind == "dense" or t % PERIOD == PERIOD - 2 else 0.0 for t in range(1, 61)]
    slopes[::PERIOD] = [large] * len(slopes[::PERIOD])
    x, low, high = {"dense": (0.0, -1.0, 1.0), "sparse": (1.0, 0.0, 1.0)}[kind]
    expected = []
    with jax.enable_x64(True):
        for t, d in enumerate(DIRECTIONS[name](slopes), start=1):
            x = min(max(x - RATE / math.sqrt(t) * d, low), high)
            expected.append(x)
    problem = {"dense": counterexamples.DENSE, "sparse": counterexamples.SPARSE}[kind]
    found = counterexamples.solve(problem, optimizer, GRID, steps=60, trace=True)[(slice(None), *POINT)]
    assert len(set(expected)) > 10
    # 60 steps, each of a few roundings in x (at most 1)
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=60 * 8 * 2.0**-53)
    distances = counterexamples.solve(problem, optimizer, GRID, steps=60)[POINT]
    assert distances == pytest.approx(np.abs(np.array(expected) - problem.optimum).mean(), abs=1e-12)


def test_the_words_of_the_house_stay_inside_their_boxes() -> None:
    """Measured in DejaVu, which is wider than the fonts that a browser prefers."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    root = ElementTree.parse(FIGURES / "house.svg").getroot()
    (_, _, width, _) = map(float, root.attrib["viewBox"].split())
    boxes = [tuple(float(box.attrib[key]) for key in ("x", "y", "width", "height")) for box in root.iter(f"{SVG}rect")]
    texts = list(root.iter(f"{SVG}text"))
    assert len(texts) > 30
    for text in texts:
        kinds = text.attrib.get("class", "").split()
        size = next((size for kind, size in SIZES.items() if kind in kinds), 15.0)
        font = FontProperties(
            family="DejaVu Sans Mono" if "code" in kinds else "DejaVu Sans",
            weight="bold" if "font-weight" in text.attrib else "normal",
        )
        extent = TextPath((0.0, 0.0), text.text, size=size, prop=font).get_extents().width
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        if "head" in kinds:
            assert x + extent < width, text.text
            continue
        left, top, wide, high = next(
            box for box in boxes if box[0] < x < box[0] + box[2] and box[1] < y < box[1] + box[3]
        )
        assert max(left - (x - extent / 2), x + extent / 2 - (left + wide)) < -2.0, text.text
        assert top + size * 0.9 < y < top + high - size * 0.3, text.text
