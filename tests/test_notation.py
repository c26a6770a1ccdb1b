"The conversions of the chapter on notation, tried on the libraries themselves where they are installed."
import json
from pathlib import Path

import numpy as np
import pytest
import torch

T, B, I, H = 5, 4, 3, 6
LAYERS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}


@pytest.fixture(scope="module")
def chapter():
    "What the cells of the chapter define."
    cells = json.loads((Path(__file__).parent.parent / "nbs/00_notation.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    return names


@pytest.fixture(params=LAYERS)
def case(request, chapter):
    "A cell's name, its parameters, an input, and the states that PyTorch computes from them."
    layer = chapter["filled"](LAYERS[request.param](I, H, dtype=torch.float64), seed=3)
    x = np.random.default_rng(3).standard_normal((T, B, I))
    return request.param, chapter["arrays"](layer), x, layer(torch.from_numpy(x))[0].detach().numpy()


def test_orders_hold_the_same_gates(chapter):
    for orders in chapter["ORDERS"].values():
        assert {cell: sorted(order) for cell, order in orders.items()} == {"lstm": sorted("ifgo"), "gru": sorted("rzn")}


def test_a_round_trip_changes_nothing(chapter, case):
    cell, params, _, _ = case
    back = chapter["from_onnx"](*chapter["to_onnx"](params, cell), cell)
    assert all((back[name] == params[name]).all() for name in params) and back.keys() == params.keys()


def test_keras_agrees(chapter, case, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    cell, params, x, states = case
    layer = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU}[cell](H, return_sequences=True, dtype="float64")
    layer.build((B, T, I))
    layer.set_weights(list(chapter["to_keras"](params, cell)))
    output = layer(torch.from_numpy(x.swapaxes(0, 1))).detach().numpy().swapaxes(0, 1)
    assert np.abs(output - states).max() < 1e-12


def test_onnx_agrees(chapter, case):
    onnx = pytest.importorskip("onnx", reason="ONNX is not installed")
    from onnx.reference import ReferenceEvaluator
    cell, params, x, states = case
    options = {"linear_before_reset": 1} if cell == "gru" else {}
    node = onnx.helper.make_node(cell.upper(), list("XWRB"), ["Y"], hidden_size=H, **options)
    info = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None) for name in "XWRBY"}
    graph = onnx.helper.make_graph([node], cell, [info[name] for name in "XWRB"], [info["Y"]])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)])
    feed = dict(zip("XWRB", [x, *chapter["to_onnx"](params, cell)]))
    (output,) = ReferenceEvaluator(model).run(None, feed)
    assert output.shape == (T, 1, B, H)
    assert np.abs(output[:, 0] - states).max() < 1e-12
