"""Classification: trains a classifier on the vectors of labelled texts, in the same way for each side."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed import bootstrap
from qembed.errors import BadInput, MissingExtra
from qembed.eval import fidelity
from qembed.eval.tasks import Metric, Outcome, Task, Vectors, labels
from qembed.installation import how_to_install
from qembed.text.display import counted
from qembed.text.texts import Text

CLASSIFIERS = ("logistic", "lightgbm")
FOLDS = 5
SEED = 0
ITERATIONS = 1000


@dataclass(frozen=True)
class Labelled:
    """Texts with labels; `test` marks those to predict with a classifier trained on the others.

    None: all are predicted, each by a classifier trained on the other folds (stratified cross-validation).
    """

    name: str
    sha256: str
    texts: list[Text]
    labels: list[str]
    test: list[bool] | None


def task(labelled: Labelled, classifier: str = "logistic") -> Task:
    """The task on `labelled`, with one of CLASSIFIERS.

    Raises:
        BadInput: fewer than two labels.
        MissingExtra: the classifier's package is not installed.
    """
    check_package(classifier)
    classes, numbers = np.unique(np.array(labelled.labels, object), return_inverse=True)
    splits = list(_splits(labelled, numbers))
    notes = _unseen(labelled, classes, numbers)

    def measure(candidate: Vectors, baseline: Vectors) -> Outcome:
        predictions = [
            _predict(fidelity.unit_or_zero(vectors), numbers, splits, classifier) for vectors in (baseline, candidate)
        ]
        rows = np.sort(np.concatenate([test for _, test in splits]))
        return Outcome(
            _metrics([labelled.texts[row].language for row in rows], numbers[rows], *(side[rows] for side in predictions)),
            notes,
        )

    test_texts = sum(len(test) for _, test in splits)
    return Task(
        name="classification",
        data={
            "name": labelled.name,
            "sha256": labelled.sha256,
            "texts": len(numbers),
            "tested": test_texts,
            "labels": len(classes),
        },
        texts=labelled.texts,
        measure=measure,
        settings={"classifier": classifier, "folds": len(splits) if labelled.test is None else None},
    )


def check_package(classifier: str) -> None:
    """Check that the classifier's package is installed.

    Raises:
        MissingExtra: it is not.
    """
    try:
        import sklearn  # noqa: F401

        if classifier == "lightgbm":
            import lightgbm  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(f"--task classification needs {error.name}: {how_to_install('eval')}") from error
    except OSError as error:
        raise MissingExtra(f"LightGBM cannot be loaded: {error} (on Debian and Ubuntu: apt-get install libgomp1)") from error


def _splits(labelled: Labelled, numbers: NDArray[np.intp]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Pairs of training rows and rows to predict."""
    if labelled.test is not None:
        test = np.array(labelled.test)
        train_labels = len(np.unique(numbers[~test]))
        if train_labels < 2 or not test.any():
            what = f"{counted(train_labels, 'label')} to train on" if test.any() else "no texts to test on"
            raise BadInput(f"{labelled.name}: {what}; at least two labels are needed to tell apart")
        yield np.flatnonzero(~test), np.flatnonzero(test)
        return
    counts = np.sort(np.bincount(numbers))[::-1]
    if len(counts) < 2 or counts[1] < 2:
        what = f"all {counts[0]} texts have the same label" if len(counts) < 2 else "only one label has more than one text"
        raise BadInput(f"{labelled.name}: {what}; at least two labels with two texts each are needed")
    from sklearn.model_selection import StratifiedKFold

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of labels with fewer texts than folds
        # With this many folds, every training part has at least the two most common labels.
        yield from StratifiedKFold(min(FOLDS, int(counts[1])), shuffle=True, random_state=SEED).split(numbers, numbers)


def _unseen(labelled: Labelled, classes: NDArray[Any], numbers: NDArray[np.intp]) -> list[str]:
    """A note on test labels that no training text has."""
    if labelled.test is None:
        return []
    test = np.array(labelled.test)
    unseen = np.setdiff1d(numbers[test], numbers[~test])
    return [f"labels to test that were not trained on: {', '.join(map(str, classes[unseen][:5]))}"] if len(unseen) else []


def _predict(
    vectors: NDArray[np.float32],
    numbers: NDArray[np.intp],
    splits: Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]],
    classifier: str,
) -> NDArray[np.intp]:
    """The predicted class [n] of each tested row, −1 for the others."""
    predicted = np.full(len(numbers), -1, np.intp)
    for train, test in splits:
        model = _classifier(classifier)
        model.fit(vectors[train], numbers[train])
        predicted[test] = model.predict(vectors[test])
    return predicted


def _classifier(name: str) -> Any:
    if name == "lightgbm":
        from lightgbm import LGBMClassifier

        return LGBMClassifier(random_state=SEED, deterministic=True, force_col_wise=True, min_child_samples=5, verbose=-1)
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=ITERATIONS, random_state=SEED)


def _metrics(
    languages: Sequence[str | None], truth: NDArray[np.intp], baseline: NDArray[np.intp], candidate: NDArray[np.intp]
) -> list[Metric]:
    """Accuracy and macro-F1 of all rows, and of each language if there are several."""
    distinct = sorted({language for language in languages if language})
    groups: list[str | None] = [None, *(distinct if len(distinct) > 1 else [])]
    metrics = []
    scores: tuple[tuple[str, Callable[[NDArray[np.intp], NDArray[np.intp]], float]], ...] = (
        ("accuracy", labels.accuracy),
        ("macro-F1", labels.macro_f1),
    )
    for group in groups:
        rows = np.flatnonzero([group is None or language == group for language in languages])
        actual, predictions = truth[rows], (baseline[rows], candidate[rows])
        for name, score in scores:

            def difference(
                sample: NDArray[np.intp],
                score: Callable[..., float] = score,
                actual: NDArray[np.intp] = actual,
                predictions: tuple[NDArray[np.intp], NDArray[np.intp]] = predictions,
            ) -> float:
                before, after = (score(actual[sample], side[sample]) for side in predictions)
                return float(after - before)

            values = [score(actual, side) for side in predictions]
            interval = bootstrap.of_statistic(difference, len(rows))
            main = group is None and name == "accuracy"
            metrics.append(Metric(name, values[0], values[1], interval, len(rows), group, main=main))
    return metrics
