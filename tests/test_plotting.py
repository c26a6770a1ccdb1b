"Figures, drawings and colored text: sound markup, readable colors, clear errors, and no state left behind."
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from rnnbook.plotting import (
    COLORS, HTML, SVG, draw_bidirectional, draw_cell, draw_stack, draw_unrolled, plot_activations, plot_connectivity, plot_curves, plot_gates, plot_gradient_norms, plot_histograms, plot_rows, plot_spectra, plot_surface,
    show_text, use_style,
)

NAMES = {"xlabel": "step", "ylabel": "value"}
PARTS = dict(rnn=6, lstm=6, gru=4)
DRAWINGS = [draw_cell(kind, step) for kind, parts in PARTS.items() for step in (None, *range(1, parts + 1))] + [
    draw_unrolled(steps, gradient) for steps in (1, 3, 8) for gradient in (False, True)
] + [draw_stack(layers, steps) for layers, steps in ((1, 1), (3, 3), (6, 8))] + [draw_bidirectional(steps) for steps in (1, 8)]


@pytest.fixture
def axes():
    return Figure().subplots()


def luminance(color):
    rgb = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


def contrast(a, b):
    dark, light = sorted([luminance(a), luminance(b)])
    return (light + 0.05) / (dark + 0.05)


def text_of(page):
    "The text of a colored text without its legend."
    return "".join(ET.fromstring(page.source)[0].itertext())


def spans(page):
    "(background, text) of each span of a colored text."
    return [(re.search("background:(#[0-9a-f]{6})", span.get("style"))[1], span.text) for span in ET.fromstring(page.source)[0]]


# ---- colors and style

def test_each_cell_has_distinct_colors():
    for cell in ("xhy", "xifgochy", "xrznhy"):
        assert len({COLORS[key] for key in cell}) == len(cell)
    assert set(COLORS) == {*"ifgochrznxy", "grey"}


def test_style_is_packaged_and_set_only_on_request():
    code = "import matplotlib as m; d = dict(m.rcParams); import rnnbook.plotting as p; assert d == dict(m.rcParams)\n" \
           "p.use_style(); assert m.rcParams['axes.spines.top'] is False"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_curve_styles_differ_in_grey():
    with plt.rc_context():
        use_style()
        styles = [(s["linestyle"], 116 * np.cbrt(luminance(s["color"]))) for s in plt.rcParams["axes.prop_cycle"]]
    assert len(styles) == 7
    for k, (dash, light) in enumerate(styles):
        assert all(dash != other or abs(light - lightness) > 10 for other, lightness in styles[:k])


# ---- curves

@pytest.mark.parametrize("curve, x, y", [
    ([3, 1, 2], [0, 1, 2], [3, 1, 2]),
    (np.array([3.0, 1.0]), [0, 1], [3, 1]),
    (torch.tensor([3.0, 1.0], requires_grad=True), [0, 1], [3, 1]),
    ([torch.tensor(3.0), torch.tensor(1.0)], [0, 1], [3, 1]),
    (([5, 6], [3, 1]), [5, 6], [3, 1]),
    ([[3, 1]], [0, 1], [3, 1]),
])
def test_one_run(axes, curve, x, y):
    plot_curves({"loss": curve}, **NAMES, ax=axes)
    (line,) = axes.lines
    assert (line.get_xdata() == x).all() and (line.get_ydata() == y).all() and axes.get_legend() is None


def test_seeds_show_and_their_median_counts(axes):
    plot_curves({"loss": [([0, 1, 2], [0, 10, 20]), ([0, 1, 2, 3], [1, 11, 21, 31]), ([0, 2], [5, 45])]}, **NAMES, ax=axes)
    assert [line.get_linewidth() < 1 for line in axes.lines] == [True, True, True, False]
    assert axes.lines[-1].get_xdata().tolist() == [0, 1, 2] and axes.lines[-1].get_ydata().tolist() == [1, 11, 21]


def test_seeds_as_rows_of_an_array(axes):
    plot_curves({"loss": np.array([[1.0, 2.0], [3.0, 4.0], [8.0, 9.0]])}, **NAMES, ax=axes)
    assert len(axes.lines) == 4 and axes.lines[-1].get_ydata().tolist() == [3, 4]


def test_fixed_labels_keep_their_color_and_others_avoid_it(axes):
    with plt.rc_context():
        use_style()
        plot_curves({"baseline": [1, 2], "h": [1, 2], "f": [1, 2], "g": [2, 3]}, **NAMES, ax=axes)
    color = {line.get_label(): line.get_color().lower().strip("#") for line in axes.lines}
    assert all("#" + color[key] == COLORS[key].lower() for key in "hfg")
    assert len(set(color.values())) == 4
    assert len({line.get_linestyle() for line in axes.lines if line.get_label() in COLORS}) == 3


def test_options_of_curves(axes):
    plot_curves({"a": [1, 2], "b": [2, 3]}, **NAMES, title="T", logx=True, logy=True, xlim=(0.5, 4), ylim=(1, 9), ax=axes)
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlim(), axes.get_ylim()) == ("log", "log", (0.5, 4), (1, 9))
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("step", "value", "T") and axes.get_legend()


@pytest.mark.parametrize("curves, message", [
    ({"loss": ([1, 2], [1])}, r"curves\['loss'\]: expected x and y of one length, at least 1, got \(2,\) and \(1,\)"),
    ({"loss": []}, r"curves\['loss'\]: .* got \(0,\)"),
    ({f"{k}": [k] for k in range(20)}, "curves: expected at most"),
])
def test_curves_refused(axes, curves, message):
    with pytest.raises(ValueError, match=message):
        plot_curves(curves, **NAMES, ax=axes)
    assert not axes.lines


def test_a_curve_may_hold_a_value_that_is_not_finite(axes):
    plot_curves({"diverged": [1.0, np.inf, np.nan]}, **NAMES, ax=axes)
    assert np.isnan(axes.lines[0].get_ydata()[2])


def test_gradient_norms_are_logarithmic_and_in_sight(axes):
    plot_gradient_norms({"h": 0.5 ** np.arange(30)}, ylim=None, title="T", ax=axes)
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log" and low < 0.5 ** 29 and high > 1


def test_a_figure_of_its_own_is_shown_on_a_rounded_card(monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    plot_curves({"loss": [1, 2]}, **NAMES)
    plot_activations(np.zeros((4, 3)))
    plot_gradient_norms({"loss": [1, 2]})
    assert len(shown) == 3
    for figure in shown:
        (card,) = figure.artists
        assert to_rgb(card.get_facecolor()) == (1, 1, 1) and not figure.patch.get_visible()
        assert "Round" in type(card.get_boxstyle()).__name__
        plt.close(figure)


def test_given_axes_are_not_shown(axes, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("shown"))
    before = plt.get_fignums()
    plot_curves({"loss": [1, 2]}, **NAMES, ax=axes)
    plot_activations(np.zeros((2, 2)), ax=axes)
    assert plt.get_fignums() == before


# ---- activations

def test_activations(axes):
    states = torch.linspace(-0.5, 3.0, 12, requires_grad=True).reshape(4, 3)  # (T, H)
    plot_activations(states, [" ", "\n", "a", "word"], title="T", ax=axes)
    image = axes.images[0]
    assert image.get_array().shape == (3, 4) and image.get_clim() == (-3, 3)
    assert image.get_array()[2, 3] == pytest.approx(3.0)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["␣", "↵", "a", "word"]


@pytest.mark.parametrize("states, tokens, message", [
    (np.zeros(3), None, r"states: expected 2 dimensions, got shape \(3,\)"),
    (np.full((2, 2), np.nan), None, "states: expected finite values, got nan"),
    (np.zeros((3, 2)), "ab", "tokens: expected 3, one per step, got 2"),
])
def test_activations_refused(axes, states, tokens, message):
    with pytest.raises(ValueError, match=message):
        plot_activations(states, tokens, ax=axes)


# ---- gates

def test_gates(axes):
    plot_gates({"i": torch.tensor([0.0, 1.0, 0.5]), "c": [-2.0, 0.0, 4.0], "kept": [0, 0, 0]}, ["a", " ", "b"], title="T", ax=axes)
    i, c, kept = (band.get_data() for band in axes.patches)
    assert np.allclose(i.values, [0.92, 0.08, 0.5]) and i.baseline == 0.92          # a gate is drawn from the foot of its band
    assert np.allclose(c.values, [1.71, 1.5, 1.08]) and c.baseline == 1.5           # a state from the middle, by its largest magnitude
    assert (kept.values == 2.92).all()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["i", "c (±4)", "kept"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "␣", "b"]
    assert [band.get_facecolor()[:3] for band in axes.patches] == [to_rgb(COLORS[key]) for key in ("i", "c", "grey")]
    assert axes.get_xlim() == (-0.5, 2.5) and axes.get_ylim() == (3, 0)


@pytest.mark.parametrize("gates, tokens, message", [
    ({"i": np.zeros((2, 2))}, None, r"gates\['i'\]: expected 1 dimension, got shape \(2, 2\)"),
    ({"i": [0.0, np.nan]}, None, r"gates\['i'\]: expected finite values, got nan"),
    ({"i": [0, 1], "f": [1]}, None, r"gates\['f'\]: expected \(2,\) like the first, got \(1,\)"),
    ({"i": [0, 1]}, "a", "tokens: expected 2, one per step, got 1"),
])
def test_gates_refused(axes, gates, tokens, message):
    with pytest.raises(ValueError, match=message):
        plot_gates(gates, tokens, ax=axes)
    assert not axes.patches


# ---- colored text

PRINTABLE = st.text(st.characters(blacklist_categories=["Cs", "Cc"]) | st.sampled_from("\n\t<>&\"' "), max_size=40)


@given(PRINTABLE, st.randoms(use_true_random=False))
def test_no_character_is_lost(text, random):
    values = [random.choice([-1.0, 0.0, 0.3, 1.0]) for _ in text]
    for page in (show_text(text, values), plot_connectivity(text, np.abs(values))):
        assert text_of(page) == text
        backgrounds = [background for background, _ in spans(page)]
        assert all(a != b for a, b in zip(backgrounds, backgrounds[1:]))  # neighbors of equal color are one span


def test_colors_follow_the_values():
    (blue, _), (white, middle), (orange, _) = spans(show_text("abbc", [-1, 0, 0, 1]))
    assert middle == "bb" and white == "#ffffff" and orange == COLORS["g"].lower()
    assert to_rgb(blue)[2] > to_rgb(blue)[0]
    assert spans(show_text("ab", [-7, 7])) == spans(show_text("ab", [-1, 1]))
    assert [background for background, _ in spans(plot_connectivity("abc", [0, 2, 4]))] == [
        background for background, _ in spans(plot_connectivity("abc", [0, 0.2, 0.4]))]  # relative to the largest


def test_text_can_be_read_on_every_color():
    many = np.linspace(-1, 1, 201)
    for page in (show_text("x" * 201, many), plot_connectivity("x" * 201, np.abs(many))):
        assert min(contrast("#222222", background) for background, _ in spans(page)) >= 4.5


@pytest.mark.parametrize("call, values, message", [
    (show_text, [0.1], r"values: expected \(2,\), one per character of text, got \(1,\)"),
    (show_text, [[0.1, 0.2]], "values: expected 1 dimension, got shape"),
    (show_text, [0.1, np.inf], "values: expected finite values, got inf"),
    (plot_connectivity, [0.1], r"magnitudes: expected \(2,\)"),
    (plot_connectivity, [0.1, -0.2], "magnitudes: expected values >= 0, got -0.2"),
])
def test_colored_text_refused(call, values, message):
    with pytest.raises(ValueError, match=message):
        call("ab", values)


# ---- drawings

@pytest.mark.parametrize("drawing", DRAWINGS, ids=str)
def test_a_drawing_is_sound(drawing):
    root = ET.fromstring(drawing._repr_svg_())
    children = [child.tag.rpartition("}")[2] for child in root]
    assert children[:3] == ["title", "desc", "rect"] and set(children[3:]) == {"g"}
    assert root[0].text and root[1].text
    assert root[2].get("fill") == "#ffffff" and float(root[2].get("rx")) > 0
    width, height = float(root.get("width")), float(root.get("height"))
    for element in root.iter():
        assert not {"id", "class", "href", "marker-end"} & set(element.attrib)  # nothing that could clash or be fetched
        if element.tag.endswith("text"):
            assert "serif" in element.get("font-family") and contrast(element.get("fill"), "#ffffff") >= 4.5
            assert 0 < float(element.get("x")) < width and 0 < float(element.get("y")) < height
        if element.tag.endswith("circle"):
            assert 0 < float(element.get("cx")) < width and 0 < float(element.get("cy")) < height


def parts(drawing):
    return [ET.tostring(part) for part in ET.fromstring(drawing.source).findall("{*}g")]


@pytest.mark.parametrize("kind, count", PARTS.items())
def test_a_cell_grows_part_by_part(kind, count):
    whole = parts(draw_cell(kind))
    assert len(whole) == count
    assert all(parts(draw_cell(kind, step)) == whole[:step] for step in range(1, count + 1))


def test_the_unrolled_network_has_a_part_per_step():
    for steps in (1, 4):
        forward, both = draw_unrolled(steps), draw_unrolled(steps, gradient=True)
        assert len(parts(forward)) == len(parts(both)) == steps + 1
        assert (forward.source.count("dasharray"), both.source.count("dasharray")) == (0, 2 * steps)


@pytest.mark.parametrize("call, message", [
    (lambda: draw_cell("elman"), "kind: expected one of 'rnn', 'lstm', 'gru', got 'elman'"),
    (lambda: draw_cell("rnn", 0), "step: expected 1 to 6, got 0"),
    (lambda: draw_cell("rnn", 7), "step: expected 1 to 6, got 7"),
    (lambda: draw_unrolled(0), "steps: expected 1 to 8, got 0"),
    (lambda: draw_unrolled(9), "steps: expected 1 to 8, got 9"),
    (lambda: draw_bidirectional(0), "steps: expected 1 to 8, got 0"),
    (lambda: draw_stack(7), "layers: expected 1 to 6, got 7"),
    (lambda: draw_stack(2, 9), "steps: expected 1 to 8, got 9"),
])
def test_drawings_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_holders_show_what_they_hold_and_print_little():
    assert HTML("<b>x</b>")._repr_html_() == "<b>x</b>" and SVG("<svg/>")._repr_svg_() == "<svg/>"
    assert repr(draw_cell()).startswith("SVG of ") and len(repr(draw_cell())) < 40
    assert draw_cell() == draw_cell("rnn", 6) != draw_cell("rnn", 5)


# ---- histograms and surfaces

def test_histograms_share_bins_and_sum_to_one():
    axes = Figure().subplots(1, 3)
    samples = {"a": np.arange(10.0), "b": torch.zeros(2, 3), "c": [5, 5, 9]}
    plot_histograms(samples, xlabel="value", bins=9, axes=axes)
    share, edges = zip(*[(ax.patches[0].get_data().values, ax.patches[0].get_data().edges) for ax in axes])
    assert all((edges[0] == e).all() and len(e) == 10 for e in edges) and all(np.isclose(s.sum(), 1) for s in share)
    assert np.allclose(share[0], [0.1] * 8 + [0.2]) and share[1][0] == 1 and np.allclose(share[2][[5, 8]], [2 / 3, 1 / 3])
    assert [ax.get_title("left") or ax.get_title() for ax in axes] == ["a", "b", "c"]


@pytest.mark.parametrize("samples, message", [({"a": [1.0, np.nan]}, r"samples\['a'\]: expected finite"), ({"a": [1], "b": []}, r"samples\['b'\]: expected at least one")])
def test_histograms_refuse(samples, message):
    with pytest.raises(ValueError, match=message): plot_histograms(samples, xlabel="value")


@pytest.mark.parametrize("log, center", [(False, None), (True, None), (False, 1.0)])
@pytest.mark.parametrize("flat", [False, True])
def test_surface_fills_the_plane(axes, log, center, flat):
    x, y = np.linspace(0, 1, 7), np.linspace(2, 5, 4)
    z = np.ones((4, 7)) if flat else 1 + x + y[:, None]
    plot_surface(z, torch.tensor(x), y, xlabel="x", ylabel="y", log=log, center=center, ax=axes)
    assert axes.get_xlim() == (0, 1) and axes.get_ylim() == (2, 5)
    filled = axes.collections[0]
    assert filled.levels[0] <= z.min() and filled.levels[-1] >= z.max()
    assert sum(len(path) for path in filled.get_paths()) > 0


def test_paths_are_drawn_from_dot_to_cross(axes):
    path = np.array([[0.0, 2.0], [0.5, 3.0], [np.nan, np.nan]])
    plot_surface(np.ones((2, 2)), [0, 1], [2, 3], xlabel="x", ylabel="y", paths={"h": path, "other": path[:2]}, ax=axes)
    line, start, end = axes.lines[:3]
    assert np.array_equal(line.get_xydata(), path, equal_nan=True) and line.get_color() == COLORS["h"]
    assert (start.get_marker(), end.get_marker()) == ("o", "x") and start.get_xydata().tolist() == [[0, 2]]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"h", "other"}


@pytest.mark.parametrize("z, options, message", [
    (np.ones((3, 2)), {}, r"z: expected \(2, 3\), a row for each y, got \(3, 2\)"), (np.zeros((2, 3)), {"log": True}, "z: expected positive"),
    (np.full((2, 3), np.inf), {}, "z: expected finite"), (np.ones((2, 3)), {"paths": {"p": np.ones((4, 3))}}, r"paths\['p'\]: expected \(N, 2\), got \(4, 3\)"),
])
def test_surface_refuses(axes, z, options, message):
    with pytest.raises(ValueError, match=message): plot_surface(z, [0, 1, 2], [0, 1], xlabel="x", ylabel="y", ax=axes, **options)


def test_spectra_are_the_eigenvalues():
    axes, rng = Figure().subplots(1, 2), np.random.default_rng(0)
    matrices = {"a": rng.standard_normal((5, 5)), "b": torch.eye(3)}
    plot_spectra(matrices, axes=axes)
    for ax, matrix in zip(axes, matrices.values()):
        x, y = ax.lines[1].get_data()
        expected = np.linalg.eigvals(np.asarray(matrix, float))
        assert np.allclose(np.sort_complex(x + 1j * y), np.sort_complex(expected)) and ax.get_aspect() == 1
    with pytest.raises(ValueError, match=r"matrices\['c'\]: expected a square matrix, got \(2, 3\)"): plot_spectra({"c": np.ones((2, 3))})


def test_rows_draw_each_seed_and_the_median(axes):
    scores = {"h": [[1, 2], [3, 9], [5, 4]], "other": [[0, 0]]}
    plot_rows(scores, ["a", "b"], xlabel="x", rules=(1,), title="t", ax=axes)
    drawn = [list(line.get_xdata()) for line in axes.lines]
    assert drawn[:5] == [[1, 2], [3, 9], [5, 4], [3, 4], [0, 0]] and axes.get_legend() is not None
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"] and axes.get_ylim() == (1.5, -0.5)
    with pytest.raises(ValueError, match=re.escape("scores['h']: expected (seeds, 3), got (3, 2)")):
        plot_rows(scores, list("abc"), xlabel="x")
