"""The last number of an answer, by which GSM8K is scored."""

from fttrain.evaluation.metrics.additive import MeanMetric
from fttrain.evaluation.words import last_number


class FinalNumber(MeanMetric):
    """`final_number`, 0 to 100: answers whose last number is the last one of a reference."""

    names = ("final_number",)
    source = "arXiv 2110.14168"

    def values(self, prediction: str, reference: list[str]) -> tuple[float, ...]:
        said = last_number(prediction)
        return (float(said is not None and said in map(last_number, reference)),)
