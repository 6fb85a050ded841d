"""Language models as workloads of bench: checked against the slow truth like every other."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import transformers

from visionlora.bench.measure import measure
from visionlora.bench.settings import Settings
from visionlora.bench.texts import TEXTS, text_workload
from visionlora.errors import ConfigError

SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 60},
    "bert-base": {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        "vocab_size": 60,
    },
    "t5-small": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 60},
}
SETTINGS = Settings(batch=2, size=8, rank=2, rounds=1)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("name", TEXTS)
def test_every_variant_is_checked_counted_and_timed(name: str) -> None:
    result = measure(name, SETTINGS, factory=partial(text_workload, **SMALL[name]))
    assert result.errors["ours"] < 1e-4
    assert result.errors["peft"] < 1e-4
    flops = {variant: counts.flops for variant, counts in result.counts.items()}
    assert flops["floor"] < flops["ours"]
    assert flops["floor"] < flops["full"]
    assert result.samples.keys() == result.counts.keys()
    assert result.skipped.keys() == ({"linear"} if name != "bert-base" else set())


def test_the_shapes_are_those_of_the_names() -> None:
    wanted = {"gpt2": (768, 12), "bert-base": (768, 12), "t5-small": (512, 6)}
    for name, (width, depth) in wanted.items():
        config = getattr(transformers, TEXTS[name][0])()
        assert (config.hidden_size, config.num_hidden_layers) == (width, depth)


def test_texts_longer_than_the_model_reads_are_refused() -> None:
    with pytest.raises(ConfigError, match="reads up to 16 tokens, --size is 32"):
        text_workload("gpt2", Settings(size=32), **SMALL["gpt2"] | {"n_positions": 16})
