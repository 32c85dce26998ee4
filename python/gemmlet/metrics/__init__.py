"""How good predictions are: of classes, of probabilities, and of numbers. NumPy alone computes them, in float64.

Functions that `sklearn.metrics` has too have its name, and on the arguments that both take its results; scores and
probabilities are the second argument, `y_score`, everywhere. Its own are intervals (`wilson_interval`,
`bootstrap_interval`), `calibration_error` and `calibration_curve`, `mcnemar`, which compares two classifiers on the
same samples, and `classification_report`, an object with all that is known of one, which prints as a table.

Everywhere `y_true` are the labels of n samples, integers, bools or strings, and `sample_weight` (n,) what each sample
counts: finite numbers, none of them negative, of a positive sum; 1 by default. Where a function takes `labels`, these
are the classes in the order of the columns of `y_score` and of the results. By default they are those that occur,
ascending; columns of scores stand for the classes 0, 1, ... where all labels are among these and one is 0.
"""

from .classes import accuracy_score, confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score
from .curves import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from .generated import frechet_distance
from .intervals import Interval, McNemar, bootstrap_interval, mcnemar, wilson_interval
from .probabilities import CalibrationCurve, brier_score_loss, calibration_curve, calibration_error, log_loss
from .regression import mean_absolute_error, mean_squared_error, r2_score
from .report import ClassificationReport, ClassScores, classification_report

__all__ = [
    "CalibrationCurve",
    "ClassScores",
    "ClassificationReport",
    "Interval",
    "McNemar",
    "accuracy_score",
    "auc",
    "average_precision_score",
    "bootstrap_interval",
    "brier_score_loss",
    "calibration_curve",
    "calibration_error",
    "classification_report",
    "confusion_matrix",
    "frechet_distance",
    "log_loss",
    "mcnemar",
    "mean_absolute_error",
    "mean_squared_error",
    "precision_recall_curve",
    "precision_recall_fscore_support",
    "r2_score",
    "roc_auc_score",
    "roc_curve",
    "top_k_accuracy_score",
    "wilson_interval",
]
