import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from lopt_hf.planner.dimensions import KNOWN_MODELS, load_config
from tests.tiny import make_model

# Published on the models' pages, tied weights counted once
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
}


def test_every_known_model_is_compared():
    assert PARAMETERS.keys() == KNOWN_MODELS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters_is_the_published_one(name):
    config = load_config(name)
    is_vision_model = config.model_type == "llava"
    auto_class = AutoModelForImageTextToText if is_vision_model else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
    assert model.num_parameters() == PARAMETERS[name]


def test_instruction_tuned_models_have_their_base_models_dimensions():
    assert load_config("Qwen/Qwen2.5-7B-Instruct").to_dict() == load_config("Qwen/Qwen2.5-7B").to_dict()


def test_folder(tmp_path):
    config = make_model("gpt2").config
    config.save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).n_layer == config.n_layer


def test_unknown_model_offline():
    with pytest.raises(ValueError, match=r"model='Qwen/Qwen2.5-8B' .*nearest: Qwen/Qwen2.5-.B.*pass a folder, or one"):
        load_config("Qwen/Qwen2.5-8B")
