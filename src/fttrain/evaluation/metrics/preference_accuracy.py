"""How often the better answer of a pair is found the likelier one."""

from fttrain.evaluation.metrics import additive


class PreferenceAccuracy(additive.ChoiceMetric):
    """`preference_accuracy` and `preference_accuracy_by_length`, 0 to 100: pairs whose chosen answer has the larger
    log-likelihood, as it is and per token. A prediction is (log-likelihood, tokens) of each answer, and the reference
    the place of the chosen one."""

    names = ("preference_accuracy", "preference_accuracy_by_length")
