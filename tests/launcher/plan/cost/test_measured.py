"""The plan's memory against peaks that were measured on a CPU, by `tests/benchmarks/estimates.py`."""

import json
import statistics
from pathlib import Path

from tests.benchmarks.estimates import COMBINATIONS, CONFIGS, write_run

from ftlaunch.plan.cost import costs
from ftlaunch.plan.cost.devices import Device
from ftlaunch.plan.cost.memory import IMPORTED

MEASURED = Path(__file__).parents[3] / "benchmarks" / "estimates.json"
SMOL = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOL |= {"num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}
SMOL |= {"dtype": "bfloat16"}


def test_the_plan_is_within_a_tenth_of_measured_peaks(tmp_path: Path) -> None:
    """Each within 10 %, the median within 5 %, of the resident set above what imports take."""
    measured: dict[str, int] = json.loads(MEASURED.read_text())
    models = {name: tmp_path / name for name in (*CONFIGS, "smol")}
    for name, place in models.items():
        place.mkdir()
        (place / "config.json").write_text(json.dumps({"dtype": "float32"} | CONFIGS.get(name, SMOL)))
    off: dict[str, float] = {}
    for number, one in enumerate(one for one in COMBINATIONS if str(one) in measured):
        folder = tmp_path / str(number)
        folder.mkdir()
        *earlier, (_, spec) = write_run(one, models, folder)
        merged = earlier[-1][1] if earlier else None
        told = costs.of_spec(spec, Device("the CPU", False), costs.SIZES[spec.model.dtype], merged=merged)
        assert isinstance(told, costs.Cost)
        off[str(one)] = (told.memory.peak - IMPORTED) / measured[str(one)] - 1
    assert off.keys() == measured.keys()
    assert not {one: round(each, 3) for one, each in off.items() if abs(each) > 0.1}
    assert statistics.median(map(abs, off.values())) < 0.05
