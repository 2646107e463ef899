"""The shapes of published models."""

import pytest

from llmlab.models.checkpoint import config_from_hf, config_to_hf
from llmlab.models.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_config_json(name):
    assert config_from_hf(config_to_hf(preset(name))) == preset(name)


def test_the_course_models_shape_is_the_shipped_one():
    from llmlab.models.checkpoint import read_config
    from llmlab.models.course_model import MODEL

    assert read_config(MODEL) == preset("course")


def test_llama_7b_is_what_transformers_assumes():
    from transformers import LlamaConfig

    assert config_from_hf(LlamaConfig().to_dict()) == preset("llama-7b")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"name='llama-7' .*llama-7b"):
        preset("llama-7")
