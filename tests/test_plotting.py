"Figures, drawings and colored text: sound markup, readable colors, clear errors."
import xml.etree.ElementTree as ET

import pytest

from rnnbook.plotting import draw_cell, draw_unrolled, plot_connectivity, show_text


@pytest.mark.parametrize("drawing", [draw_cell("rnn"), draw_cell("rnn", step=1), draw_unrolled(1), draw_unrolled(3, gradient=True)])
def test_svg_is_well_formed(drawing):
    ET.fromstring(drawing._repr_svg_())


def test_text_is_kept():
    page = ET.fromstring(show_text("a <b> & c\n", [0.0] * 10)._repr_html_())
    assert "a <b> & c\n" in "".join(page.itertext())
    with pytest.raises(ValueError, match="magnitudes: expected"):
        plot_connectivity("ab", [1.0])
