"""Multiple choice, by what a model finds likeliest."""

from fttrain.evaluation.metrics.additive import ChoiceMetric


class MultipleChoice(ChoiceMetric):
    """`choice_accuracy` and `choice_accuracy_by_length`, 0 to 100: questions of which the right choice has the largest
    log-likelihood, as it is and per byte. A prediction is (log-likelihood, bytes) of each choice."""

    names = ("choice_accuracy", "choice_accuracy_by_length")

    def values(self, prediction: list[list[float]], reference: int) -> tuple[float, ...]:
        return super().values(prediction, reference)
