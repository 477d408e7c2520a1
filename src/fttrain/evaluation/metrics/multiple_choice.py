"""Multiple choice, by what a model finds likeliest."""

from fttrain.evaluation.metrics import additive


class MultipleChoice(additive.ChoiceMetric):
    """`choice_accuracy` and `choice_accuracy_by_length`, 0 to 100: questions of which the right choice has the largest
    log-likelihood, as it is and per byte. A prediction is (log-likelihood, bytes) of each choice."""

    names = ("choice_accuracy", "choice_accuracy_by_length")
