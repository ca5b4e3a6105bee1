"""Which layers are content: by what depends on what, in a graph whose names say nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.graph.content_groups import FEED_FORWARD, KEYS, OUTPUT, QUERIES, content_layers
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.models.spec import DenoiserSpec, InputSpec
from mpq_deploy.sensitivity.structure import clean_sample
from tests.graphs import GraphBuilder

WIDTH = 8


def attention(g: GraphBuilder, x: str, read: str, names: str) -> str:
    """Query, key, value and output layers called by four letters; ends in a sum onto ``x``."""
    q, k, v = (g.matmul(t, n, WIDTH, WIDTH) for t, n in zip((x, read, read), names[:3], strict=True))
    turned = g.op("Transpose", [k], f"turn_{names}", perm=[0, 2, 1])
    weights = g.op("Softmax", [g.op("MatMul", [q, turned], f"scores_{names}")], f"soft_{names}", axis=-1)
    out = g.matmul(g.op("MatMul", [weights, v], f"mixed_{names}"), names[3], WIDTH, WIDTH)
    return g.op("Add", [g.op("Add", [out, g.random(f"bias_{names}", WIDTH)], f"biased_{names}"), x], f"sum_{names}")


def block(g: GraphBuilder, x: str, text: str, feed_forward: bool = True) -> str:
    x = attention(g, x, x, "abcd")
    x = attention(g, x, text, "efgh")
    if feed_forward:
        inner = g.op("Relu", [g.matmul(x, "i", WIDTH, WIDTH)], "relu_ff")
        x = g.op("Add", [g.matmul(inner, "j", WIDTH, WIDTH), x], "sum_ff")
    return attention(g, x, x, "klmn")


def found(g: GraphBuilder, x: str, tmp_path: Path) -> dict[str, str]:
    last = g.matmul(x, "z", WIDTH, WIDTH)
    g.output(last, ["N", 4, WIDTH])
    return content_layers(layer_graph(load_model(g.save(tmp_path / "model.onnx"))), "sample", ("text",))


def graph() -> GraphBuilder:
    g = GraphBuilder()
    g.input("sample", ["N", 4, WIDTH])
    g.input("text", ["N", 5, WIDTH])
    return g


ROLES = {"e": QUERIES, "f": KEYS, "g": KEYS, "h": OUTPUT}


def test_cross_attention_and_the_feed_forward_behind_it(tmp_path: Path) -> None:
    g = graph()
    assert found(g, block(g, "sample", "text"), tmp_path) == {**ROLES, "i": FEED_FORWARD, "j": FEED_FORWARD}


def test_self_attention_behind_it_is_no_feed_forward(tmp_path: Path) -> None:
    g = graph()
    assert found(g, block(g, "sample", "text", feed_forward=False), tmp_path) == ROLES


def test_a_caption_s_own_projection_is_content(tmp_path: Path) -> None:
    g = graph()
    text = g.op("Relu", [g.matmul("text", "p", WIDTH, WIDTH)], "relu_text")
    assert found(g, block(g, "sample", text), tmp_path)["p"] == KEYS


def test_joint_attention_is_no_cross_attention(tmp_path: Path) -> None:
    g = graph()
    both = g.op("Concat", ["sample", "text"], "joined", axis=1)
    assert found(g, attention(g, both, both, "abcd"), tmp_path) == {}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_the_clean_sample_is_the_one_that_was_noised(prediction: str) -> None:
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 3, 2, 4, 4))
    betas = np.linspace(1e-4, 0.02, 1000)
    signal2 = np.cumprod(1 - betas)[400]
    signal, spread = (0.6, 0.4) if prediction == "flow_prediction" else (signal2**0.5, (1 - signal2) ** 0.5)
    output = {
        "epsilon": noise,
        "v_prediction": signal * noise - spread * clean,
        "sample": clean,
        "flow_prediction": noise - clean,
    }[prediction]
    spec = DenoiserSpec(
        name="n",
        source="s",
        sample=InputSpec(name="sample", shape=(2, 4, 4)),
        timestep=InputSpec(name="t"),
        prediction_type=prediction,
        scheduler={"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000},
    )
    # A learned variance follows the mean.
    learned = np.concatenate([output, noise], axis=1)
    np.testing.assert_allclose(clean_sample(spec)(signal * clean + spread * noise, 400.0, learned), clean, atol=1e-4)
