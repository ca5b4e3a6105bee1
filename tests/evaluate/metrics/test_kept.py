"""What metrics.json keeps from call to call: what replaces what, and what goes when the images are others."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from mpq_deploy.evaluate.metrics.kept import ImageMetrics, MadeFrom
from mpq_deploy.report.data import FrechetInfo, Interval, ScoreInfo

NEAR = Interval(low=0.0, high=1.0)
NOW = MadeFrom("plan", "float", "conditions", "controls")
SAMPLED = {"samples": 64, "sampler": "DDIM", "steps": 20, "seed": 5}


def distance(value=0.5, **changes):
    values = {
        **{
            "variant": "ours",
            "title": "t",
            "network": "lite",
            "network_digest": "w",
            "network_features": 4,
        },
        **{
            "against": "float",
            "against_source": "s",
            "against_samples": 64,
            "against_digest": "images",
        },
        **{
            **SAMPLED,
            "distance": value,
            "floor": 0.0,
            "interval": NEAR,
            "increase_interval": NEAR,
            "other_noise": 1,
        },
    }
    return FrechetInfo(**{**values, **changes})


def score(value=0.1, **changes):
    values = {"variant": "ours", "title": "t", "score": "lpips", "score_digest": "w", **SAMPLED}
    return ScoreInfo(**{**values, "value": value, "floor": 0.0, "other_noise": 1.0, **changes})


def metrics(*frechet, scores=(), controls=None, made_from=NOW):
    return ImageMetrics(tuple(frechet), controls or {}, made_from, tuple(scores))


def test_scores_alone_leave_the_distances():
    merged, said = metrics(scores=[score()]).added_to(metrics(distance()))
    assert (merged.frechet, merged.scores, said) == ((distance(),), (score(),), "")
    back, _ = metrics(distance()).added_to(metrics(scores=[score()]))
    assert back == merged


@pytest.mark.parametrize(
    "change",
    [
        {"network": "clip"},
        {"network_digest": "x"},
        {"samples": 128},
        {"sampler": "Euler"},
        {"steps": 50},
        {"seed": 6},
        {"against": "real"},
        {"variant": "int8"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_part_of_the_kind_keeps_results_apart(change):
    other = distance(0.7, **change)
    assert set(metrics(distance()).added_to(metrics(other))[0].frechet) == {distance(), other}


def test_the_same_kind_is_replaced_whatever_came_of_it():
    # The float model's images are what the seed says: their digest, the title and the figures are results.
    earlier = distance(0.7, against_digest="images of another release", other_noise=2)
    assert metrics(distance()).added_to(metrics(earlier))[0].frechet == (distance(),)
    real = {"against": "real", "against_digest": "photos"}
    others = distance(0.7, against="real", against_digest="other photos")
    merged = metrics(distance(**real)).added_to(metrics(others, distance(0.9, **real)))[0]
    assert set(merged.frechet) == {distance(**real), others}


def test_any_order_of_calls_ends_alike():
    calls = [
        metrics(distance(), distance(0.4, against="real")),
        metrics(distance(0.1, seed=9), scores=[score(), score(0.3, variant="int8")]),
        metrics(distance(0.2, network="clip"), controls={"int8": (distance(0.6, variant="int8"),)}),
    ]
    ends = []
    for order in itertools.permutations(calls):
        held = metrics()
        for call in order:
            held = call.added_to(held)[0]
        ends.append(held)
    assert all(end == ends[0] for end in ends)
    assert ends[0].count == 5


@pytest.mark.parametrize(
    ("field", "said"),
    [("ours", "plan"), ("float_model", "model"), ("conditions", "conditions, prompts or decoder")],
)
def test_other_images_drop_all_and_say_why(field, said):
    earlier = metrics(
        distance(seed=1), scores=[score()], made_from=replace(NOW, **{field: "former"})
    )
    merged, why = metrics(distance()).added_to(earlier)
    assert merged == metrics(distance())
    assert why == f"metrics.json is of an earlier {said}"


def test_other_controls_drop_only_theirs():
    controls, scores = {"int4": (distance(variant="int4"),)}, [score(), score(variant="int4")]
    former = metrics(
        distance(), controls=controls, scores=scores, made_from=replace(NOW, controls="former")
    )
    held, said = former.still_true(NOW)
    assert held is not None and (held.frechet, held.controls, held.scores) == (
        (distance(),),
        {},
        (score(),),
    )
    assert "controls" in said
    # Where none were measured nothing is lost, and nothing said.
    assert metrics(distance(), made_from=replace(NOW, controls="former")).still_true(NOW)[1] == ""


def test_what_is_written_is_read_and_notes_follow_from_the_rows(tmp_path):
    kept = metrics(
        distance(),
        distance(0.4, network="clip", network_features=40, against="real"),
        scores=[score()],
    )
    kept.save(tmp_path)
    assert ImageMetrics.load(tmp_path) == kept
    notes = " ".join(kept.notes)
    assert "64 images on the 4 features of lite, 64 images on the 40 features of clip" in notes
    assert "lite: no real images" in notes and "clip: no real images" not in notes
    assert "clip: no extrapolation to infinitely many images, which takes 82" in notes
    assert metrics(scores=[score()]).notes == ()
