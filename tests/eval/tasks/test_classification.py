"""Classification against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from qembed.errors import BadInput
from qembed.eval.tasks import classification
from qembed.eval.tasks.classification import Labelled
from qembed.text.texts import Text
from tests.eval.tasks.conftest import metric_named

RANDOM = np.random.default_rng(2)


def make_labelled(tests: bool) -> tuple[Labelled, np.ndarray]:
    centres = RANDOM.normal(size=(3, 12))
    numbers = RANDOM.integers(0, 3, 90)
    vectors = (centres[numbers] + 1.6 * RANDOM.normal(size=(90, 12))).astype(np.float32)
    texts = [Text(str(row), str(row), "document", "de" if row % 3 else "en") for row in range(90)]
    split = [row >= 60 for row in range(90)] if tests else None
    return Labelled("l", "0", texts, ["abc"[number] for number in numbers], split), vectors


def test_classification_equals_scikit_learns() -> None:
    data, vectors = make_labelled(tests=True)
    noisy = vectors + RANDOM.normal(size=vectors.shape).astype(np.float32)
    task = classification.task(data)
    outcome = task.measure(noisy, vectors)
    truth = np.array(data.labels)
    for side, name in ((vectors, "baseline"), (noisy, "candidate")):
        unit = side / np.linalg.norm(side, axis=1, keepdims=True)
        model = LogisticRegression(max_iter=1000).fit(unit[:60], truth[:60])
        assert getattr(metric_named(outcome, "accuracy"), name) == pytest.approx(model.score(unit[60:], truth[60:]))
    accuracy = metric_named(outcome, "accuracy")
    assert accuracy.main
    assert accuracy.count == 30
    assert accuracy.baseline is not None
    assert accuracy.candidate is not None
    assert accuracy.interval is not None
    assert accuracy.interval[0] <= accuracy.candidate - accuracy.baseline <= accuracy.interval[1]
    assert {metric.group for metric in outcome.metrics} == {None, "de", "en"}
    weighted = sum(
        metric.baseline * metric.count
        for metric in outcome.metrics
        if metric.name == "accuracy" and metric.group  # type: ignore[operator]
    )
    assert weighted / 30 == pytest.approx(accuracy.baseline)


@pytest.mark.parametrize("classifier", classification.CLASSIFIERS)
def test_without_a_split_every_text_is_predicted_once(classifier: str) -> None:
    data, vectors = make_labelled(tests=False)
    task = classification.task(data, classifier)
    assert task.settings["folds"] == 5
    accuracy = metric_named(task.measure(vectors, vectors), "accuracy")
    assert accuracy.count == 90
    assert accuracy.baseline == accuracy.candidate
    assert accuracy.baseline is not None
    assert 0.4 < accuracy.baseline < 1


def test_labels_that_cannot_be_learned_or_tested_are_refused() -> None:
    def data(labels: list[str], test: list[bool] | None = None) -> Labelled:
        return Labelled("l.csv", "0", [Text(str(row), "x") for row in range(len(labels))], labels, test)

    with pytest.raises(BadInput, match=r"l\.csv: all 4 texts have the same label"):
        classification.task(data(["a"] * 4))
    with pytest.raises(BadInput, match="only one label has more than one text"):
        classification.task(data(["a", "a", "a", "b"]))
    with pytest.raises(BadInput, match="1 label to train on"):
        classification.task(data(["a", "a", "b", "b"], [False, False, True, True]))
    with pytest.raises(BadInput, match="no texts to test on"):
        classification.task(data(["a", "a", "b", "b"], [False] * 4))
    task = classification.task(data(["a", "a", "b", "b", "c"], [False, False, False, True, True]))
    assert task.measure(np.eye(5), np.eye(5)).notes == ["labels to test that were not trained on: c"]
