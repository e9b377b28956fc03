"""Bad inputs of every command end with status 2 and one line: what is wrong, its value, what to do.

`{}` stands for a folder with a tiny model, its data and files that are none of what they are taken for.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager

from lopt_hf import cli
from lopt_hf.retention import suites
from tests.retention.small_tasks import write_tasks
from tests.tiny import make_dataset, make_model, make_pairs, make_questions, make_tokenizer

NAN = float("nan")
TRAINING: dict[str, Any] = {
    "model_name_or_path": "{}/base",
    "output_dir": "{}/out",
    "max_steps": 1,
    "max_length": 64,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
}
NO_MODEL = {"model_name_or_path": "{}/no"}  # what is said before one is looked for
DATA = dict.fromkeys(("sft", "mlaan", "peers", "pipeline"), "data.json") | {
    "dpo": "pairs.json",
    "grpo": "questions.json",
}
REWARDED = {
    "reward_funcs": ["tests.trainers.helpers.token_reward"],
    "num_generations": 2,
    "max_completion_length": 4,
    "per_device_train_batch_size": 2,
}
GRID: dict[str, Any] = {
    "model": "{}/base",
    "train_dataset": "{}/qa.json",
    "heldout_dataset": "{}/qa.json",
    "methods": {"e": {"method": "e2e"}},
    "learning_rates": [0.01],
    "seeds": [0],
    "num_train": 4,
    "num_heldout": 2,
    "training": {"max_length": 64, "bf16": False, "use_cpu": True},
    "tasks": ["tiny_sums"],
    "include_path": "{}/tasks",
    "output_dir": "{}/grid",
}
MEASURED = {"--model": "{}/tuned", "--tasks": "tiny_sums", "--include-path": "{}/tasks", "--output-dir": "{}/report"}

# Command -> what is changed in the settings of a YAML that is good, and what the line says of it
OF_A_YAML: dict[str, list[tuple[dict[str, Any], str]]] = {
    "sft": [
        ({"learning_rate": "fast"}, "learning_rate/--learning-rate: invalid float value: 'fast'"),
        ({"num_train_epochs": -1, "max_steps": -1}, "num_train_epochs=-1 must be a number above 0; or set max_steps"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1, or -1"),
        ({"warmup_steps": 2.5}, "warmup_steps=2.5 must be a whole number, or a share"),
        ({"warmup_steps": -5}, "warmup_steps = -5, Expected value warmup_steps >= 0"),
        ({"logging_steps": -2}, "logging_steps=-2 must be above 0, or set logging_strategy to 'no'"),
        ({"save_strategy": "steps", "save_steps": 0}, "save_steps=0 must be above 0"),
        ({"save_total_limit": -1}, "save_total_limit=-1 must be a number from 0 on"),
        ({"save_strategy": "sometimes"}, "save_strategy='sometimes' is unknown, nearest is 'steps'"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type='cosin' is unknown, nearest is 'cosine'"),
        ({"optim": "adamW"}, "optim='adamW' is unknown, nearest is"),
        ({"dtype": "float8"}, "dtype='float8' is unknown, nearest is"),
        ({"method": "lptt"}, "method='lptt' is unknown, nearest is 'lopt'"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"adam_beta1": 2.0}, "adam_beta1=2.0 must be a number from 0 to below 1"),
        ({"neftune_noise_alpha": -1.0}, "neftune_noise_alpha=-1.0 must be a number from 0 on"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True needs evaluations; set eval_strategy"),
        ({"eval_strategy": "steps"}, "split 'test' of '{}/data.json'"),
        ({"eval_strategy": "steps"}, "Set eval_strategy to 'no', or dataset_test_split to one that there is."),
        ({"dataset_streaming": True, "dataset_train_split": "no"}, "Set dataset_train_split to one that there is."),
        ({"dataset_name": "arithmetic"}, "lopt-hf dpo or grpo generates, and this command does not; choose 'word-pro"),
        ({"num_blocks": 99, "task_reach": 2, "local_objective": "none"}, "never reaches the first 97 blocks of num_b"),
        ({"packing": True, "packing_strategy": "best"}, "packing_strategy='best' is unknown, nearest is 'bfd_split'"),
        ({"attn_implementation": "flash9"}, 'attn_implementation="flash9"` is not supported'),
        ({"use_peft": True, "lora_r": 0}, "`r` should be a positive integer value but the value passed is 0"),
        ({"use_peft": True, "lora_target_modules": ["nowhere"]}, "Target modules {'nowhere'} not found"),
        ({"use_peft": True, "load_in_4bit": True, "load_in_8bit": True}, "8 bit and 4 bit"),
        ({"fsdp": "sharded"}, "Unknown `fsdp` option: sharded"),
        ({"split_at": [9]}, "split_at=[9] must be strictly increasing layer indices from 1 to 3"),
        ({"num_blocks": 9}, "num_blocks=9 does not fit a model with 4 layers; choose a number from 2 to 4"),
        ({"task_reach": "[1,9]"}, "task_reach=[1, 9]: 9 is not a number of blocks from 1 to num_blocks=2"),
        ({"task_reach": "x"}, "task_reach='x' is not a number of blocks"),
        ({"reach_rate_limit": 0.5}, "reach_rate_limit=0.5 is too low"),
        ({"dataset_name": "{}/empty.jsonl"}, "{}/empty.jsonl is empty. Give a file with at least one row"),
        ({"dataset_name": "{}/data.csv"}, "no file or folder '{}/data.csv'"),
        ({"dataset_train_split": "nope"}, "split 'nope' of '{}/data.json'"),
        ({"model_name_or_path": "{}/noconfig"}, "Unrecognized model in {}/noconfig"),
        ({"model_name_or_path": "{}/noweights"}, "found in directory {}/noweights"),
        ({"model_name_or_path": "{}/tokenless"}, "{}/tokenless"),
        ({"output_dir": "{}/file"}, "output_dir='{}/file' is a file; name a folder"),
        ({"output_dir": "{}/file/out"}, "output_dir='{}/file/out': {}/file is a file; name a folder"),
        ({"resume_from_checkpoint": "{}/no"}, "resume_from_checkpoint={}/no: there is no checkpoint at '{}/no'"),
        ({"report_to": "nothere"}, "nothere is not supported, only"),
        ({"bf16": True, "fp16": True}, "At most one of fp16 and bf16"),
        ({"eos_token": "<none>"}, "`eos_token` ('<none>') is not found in the vocabulary"),
        ({"model_revision": 7}, "model_revision=7 must be text; write it in quotes"),
        ({"truncation_mode": "middle"}, "truncation_mode='middle' is unknown, nearest is 'keep_end'"),
        ({"ignore_bias_buffers": True}, "unknown key in the YAML file: 'ignore_bias_buffers'"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4' does nothing without load_in_4bit; add --load_in"),
        ({"use_bnb_nested_quant": True, "load_in_8bit": True, "use_peft": True}, "use_bnb_nested_quant=True does not"),
        ({"bnb_4bit_quant_storage": "uint8"}, "bnb_4bit_quant_storage='uint8' does nothing without load_in_4bit"),
        ({"optim_args": "foo=1", **NO_MODEL}, "optim_args='foo=1': optim='adamw_torch_fused' does not read 'foo'; le"),
        ({"chat_template_path": "no.jinja", **NO_MODEL}, "chat_template_path='no.jinja': there is no such file; che"),
        ({"accelerator_config": {"bogus": 1}}, "accelerator_config={'bogus': 1}: there is no setting 'bogus' in it"),
        ({"lr_scheduler_type": "cosine_with_min_lr", **NO_MODEL}, "lr_scheduler_type='cosine_with_min_lr' cannot be"),
    ],
    "mlaan": [
        ({"window": 9}, "window=9 is more than num_blocks=4"),
        ({"leap_layers": [99]}, "leap_layers=[99] has 1 entries"),
        ({"leap": "first"}, "leap='first' is unknown, nearest is 'last'"),
        ({"calibration_tokens": 0}, "calibration_tokens=0 is too low"),
        ({"save_steps": NAN, "save_strategy": "steps"}, "save_steps=nan must be above 0"),
    ],
    "dpo": [
        ({"loss_type": ["hing"]}, "loss_type='hing' is unknown, nearest is 'hinge'"),
        ({"beta": NAN}, "beta=nan must be a number above 0"),
        ({"beta": -1.0}, "beta=-1.0 must be a number above 0"),
        ({"label_smoothing": 2.0}, "label_smoothing=2.0 must be a number from 0 to below 0.5"),
        ({"precompute_ref_batch_size": 0}, "precompute_ref_batch_size=0 must be at least 1"),
        ({"ref_model_mixup_alpha": 7.0}, "ref_model_mixup_alpha=7.0 must be a number from 0 to 1"),
        ({"dataset_name": "{}/data.json"}, "train_dataset has the columns ['completion', 'prompt']"),
        ({"dataset_name": "word-problems"}, "dataset_name='word-problems' names data that lopt-hf sft generates"),
        ({"ignore_bias_buffers": True}, "unknown key in the YAML file: 'ignore_bias_buffers'"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"bogus": 1}, **NO_MODEL},
            "lr_scheduler_type='polynomial' cannot be made with lr_scheduler_kwargs={'bogus': 1}: ",
        ),
    ],
    "grpo": [
        ({"num_generations": 1}, "at least 2 generations per prompt"),
        ({"num_generations": 3}, "generation_batch_size (2) must be divisible by num_generations (3)"),
        ({"temperature": -1.0}, "temperature=-1.0 must be a number above 0"),
        ({"top_p": 2.0}, "top_p=2.0 must be a number above 0, up to 1"),
        ({"top_k": -5}, "top_k=-5 must be a number from 0 on"),
        ({"epsilon": -1.0}, "epsilon=-1.0 must be a number from 0 on"),
        ({"beta": -1.0}, "beta=-1.0 must be a number from 0 on"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0 must be a number above 0"),
        ({"max_completion_length": 0}, "max_completion_length=0 must be at least 1"),
        ({"reward_weights": [1.0, 2.0]}, "reward weights (2) must match number of reward functions (1)"),
        ({"loss_type": "dapoo"}, "loss_type='dapoo' is unknown, nearest is 'dapo'"),
        ({"scale_rewards": "batches"}, "scale_rewards='batches' is unknown, nearest is 'batch'"),
        ({"reward_funcs": "x"}, "reward_funcs='x' must be a list of texts"),
        ({"optim": "sgd", "optim_args": "momentum=x"}, "optim_args='momentum=x' cannot be read by optim='sgd': could"),
    ],
    "peers": [
        ({"method": "badam", "badam_period": 0}, "badam_period=0 is too small; set it to 1 or more"),
        ({"method": "freeze_last", "num_blocks": 9}, "num_blocks=9 does not fit a model with 4 layers"),
        ({"method": "lisa", "lisa_layers": 99}, "layers=99, but the model has 4; use at most as many"),
        ({"method": "lisa", "adam_beta2": 1.0}, "adam_beta2=1.0 must be a number from 0 to below 1"),
        ({"lr_scheduler_type": "cosine_with_min_lr", **NO_MODEL}, "lr_scheduler_type='cosine_with_min_lr' cannot be"),
    ],
    "pipeline": [
        ({"num_stages": 3, "num_blocks": 2}, "num_stages=3 is more than num_blocks=2"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"dataset_name": "{}/empty.jsonl"}, "{}/empty.jsonl is empty"),
        ({"lora_r": 8}, "lora_r=8 does nothing without use_peft; add --use_peft, or leave it out"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4' does nothing without load_in_4bit"),
        ({"optim_args": "foo=1", **NO_MODEL}, "optim_args='foo=1': optim='adamw_torch_fused' does not read 'foo'"),
        ({"output_dir": "{}/file"}, "output_dir='{}/file' is a file; name a folder"),
        ({"output_dir": "{}/tuned"}, "output_dir='{}/tuned' holds another run's model (model.safetensors)"),
        ({"output_dir": "{}/unfinished"}, "output_dir='{}/unfinished' holds another run's checkpoints"),
        (
            {"gradient": "delayed", "resume_from_checkpoint": "{}/late"},
            "was trained with num_stages=3, but this run has num_stages=2",
        ),
        (
            {"gradient": "local", "resume_from_checkpoint": "{}/late"},
            "was trained with gradient=delayed, but this run has gradient=local",
        ),
        (
            {"data_parallel": 2, "resume_from_checkpoint": "{}/late"},
            "was trained with data_parallel=1, but this run has data_parallel=2",
        ),
    ],
    "compare": [
        ({"methodes": {}}, "unknown setting 'methodes' (did you mean 'methods'?)"),
        ({"methods": {}}, "methods={} is empty; name at least one"),
        ({"methods": {"e": {"method": "lptt"}}}, "methods.e.method='lptt' is unknown, nearest is 'lopt'"),
        (
            {"methods": {"e": {"method": "e2e"}, "f": {"method": "e2e", "num_blockz": 2}}},
            "recipe.yaml: methods.f.num_blockz=2 is no option of lopt-hf sft (did you mean 'num_blocks'?); remove it",
        ),
        ({"methods": {"e": {"num_blocks": 2.5}}}, "recipe.yaml: methods.e.num_blocks=2.5 must be a whole number."),
        (
            {"methods": {"e": {"num_blocks": "two"}}},
            "recipe.yaml: methods.e.num_blocks='two' cannot be read: invalid literal for int",
        ),
        (
            {"methods": {"e": {"method": "lisa"}}, "training": {"max_length": 64, "task_reach": [2]}},
            "training.task_reach=[2] is no option of lopt-hf peers; remove it or correct its name. Method 'e' is",
        ),
        (
            {"methods": {"e": {"method": "mlaan", "reconstruction_weight": 1.0}}},
            "methods.e.reconstruction_weight=1.0 is no option of lopt-hf mlaan",
        ),
        (
            {"methods": {"e": {"num_stages": 2, "micro": 1}}},
            "methods.e.micro=1 is no option of lopt-hf pipeline",
        ),
        ({"learning_rates": [-1.0]}, "learning_rates: -1.0 is no learning rate; set it above 0"),
        ({"seeds": [0, 0]}, "seeds=[0, 0] must name at least one value, and each value once"),
        ({"workers": 0}, "workers=0 is too small; set it to 1 or more"),
        ({"contrasts": [["a", "b"]]}, "contrasts: ['a', 'b'] must be two of the methods e"),
        ({"num_train": 10**6}, "num_train=1000000, but only 8 rows"),
        ({"model": "{}/no"}, "model '{}/no' is no folder here"),
        ({"output_dir": "{}/file/grid"}, "output_dir='{}/file/grid': {}/file is a file; name a folder"),
        ({"train_dataset": "{}/data.json"}, "train_dataset={}/data.json has the columns"),
        ({"training": {"bf16": False}}, "training.max_length is missing; set it"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; use auto, float32 or bfloat16"),
    ],
}
REPL = ["repl", "--model", "{}/base", "--output_dir", "{}/repl", "--bf16", "false", "--use_cpu", "true"]
PLAN = ["plan", "--model", "{}/base", "--device-memory", "1GiB", "--batch-size", "1", "--seq-length", "8"]
RETENTION = ["retention", "--baseline", "{}/base", *(part for pair in MEASURED.items() for part in pair)]
CURVES = ["curves", "--run", "a={}/run", "--metric", "loss", "--output"]
SIMULATE = ["pipeline", "simulate"]
IMAGES = ["pipeline", "--task", "image", "--train_file", "{}/no.parquet", "--bf16", "false", "--use_cpu", "true"]
OF_A_COMMAND_LINE: list[tuple[list[str], str]] = [
    ([*REPL, "--layers_to_replace", "0"], "layers_to_replace=[0] must name layers from 1 to 2"),
    ([*REPL, "--layers_to_replace", "1", "1"], "layers_to_replace=[1, 1]: layers 1 and 1 are not apart"),
    ([*REPL, "--num_layers_to_replace", "9"], "num_layers_to_replace=9 does not fit a model with 4 layers"),
    ([*REPL, "--num_layers_to_replace", "1", "--ridge", "-1"], "ridge=-1.0 must be a number from 0 on"),
    (
        [*REPL, "--num_layers_to_replace", "1", "--compare", "linea"],
        "operator='linea' is unknown, nearest is 'linear'",
    ),
    ([*REPL, "--num_layers_to_replace", "1", "--scratch", "{"], "scratch='{' is no JSON object"),
    ([*REPL, "--num_layers_to_replace", "1", "--eval_chunks", "0"], "eval_chunks=0 is too small"),
    ([*REPL, "--num_layers_to_replace", "1", "--max_steps", "0"], "max_steps=0 must be at least 1"),
    ([*REPL, "--layers_to_replace", "1", "--dataset_name", "{}/no.json"], "no file or folder '{}/no.json'"),
    ([*REPL, "--layers_to_replace", "1", "--output_dir", "{}/file/x"], "output_dir='{}/file/x': {}/file is a file"),
    (
        [*REPL, "--layers_to_replace", "1", "--lr_scheduler_type", "cosine_with_min_lr"],
        "lr_scheduler_type='cosine_with_min_lr' cannot be made with lr_scheduler_kwargs={}",
    ),
    (
        ["image", "--output_dir", "{}/image", "--lr_scheduler_type", "cosine_with_min_lr"],
        "lr_scheduler_type='cosine_with_min_lr' cannot be made with lr_scheduler_kwargs={}",
    ),
    (
        ["image", "--output_dir", "{}/image", "--train_file", "{}/no.parquet"],
        "no file or folder '{}/no.parquet'",
    ),
    ([*IMAGES, "--output_dir", "{}/file"], "output_dir='{}/file' is a file; name a folder"),
    ([*IMAGES, "--output_dir", "{}/tuned"], "output_dir='{}/tuned' holds another run's model (model.safetensors)"),
    (["image", "--output_dir", "{}/image", "--method", "reach"], "task_reach=[1] is freezing the early blocks"),
    ([*RETENTION, "--limit", "0"], "limit=0 leaves nothing to measure; set it to 1 or more"),
    ([*RETENTION, "--confidence", "2"], "confidence=2.0 is not between 0 and 1"),
    ([*RETENTION, "--output-dir", "{}/file/new"], "output_dir='{}/file/new': {}/file is a file; name a folder"),
    ([*RETENTION, "--cache-dir", "{}/file/new"], "cache_dir='{}/file/new': {}/file is a file; name a folder"),
    ([*RETENTION, "--dtype", "int8"], "dtype='int8' is unknown; use auto"),
    ([*RETENTION, "--batch-size", "-1"], "batch_size=-1 leaves nothing to measure"),
    ([*RETENTION, "--include-path", "{}/no"], "include_path={}/no is not a folder"),
    ([*RETENTION, "--model", "=x"], "model='=x' names no label or no model; give LABEL=MODEL"),
    ([*RETENTION, "--num-fewshot", "-1"], "num_fewshot=-1 is negative; set it to 0 or more"),
    ([*RETENTION, "--heldout-data", "{}/no.json"], "no file or folder '{}/no.json'"),
    ([*RETENTION, "--adapter-base", "{}/base"], "adapter_base='{}/base': no model is an adapter; leave it out"),
    ([*RETENTION, "--suite", "nope"], "--suite: invalid choice: 'nope'"),
    ([*CURVES, "{}/x.png"], "--run {}/run: {}/run/trainer_state.json is no whole log"),
    ([*CURVES, "{}/x.xyz"], "--output={}/x.xyz: '.xyz' is no format of a figure; use .png"),
    ([*PLAN, "--device-memory", "80"], "device_memory='80' is no size of memory"),
    ([*PLAN, "--strategies", "lop"], "strategies='lop' is unknown, nearest is 'lopt'"),
    ([*PLAN, "--headroom", "nan"], "headroom=nan must be a share of the device"),
    ([*PLAN, "--calibration", "{}/broken.json"], "calibration='{}/broken.json' is no measurement"),
    ([*PLAN, "--num-blocks", "0"], "num_blocks=(0,) must name numbers of 2 or more"),
    ([*PLAN, "--seq-length", "100000"], "seq_length=100000: the model takes 128 tokens; use at most 128"),
    ([*PLAN, "--write", "{}/no/x.yaml"], "write={}/no/x.yaml: its folder does not exist"),
    ([*PLAN, "--plot", "{}/x.xyz"], "plot={}/x.xyz: '.xyz' is no format of a figure"),
    ([*PLAN, "--task-reach", "9"], "task_reach=(9,) reaches 9 blocks"),
    (["bench", "nope"], "invalid choice: 'nope' (choose from 'step'"),
    (["bench", "step", "--methods", "lop"], "methods='lop' is unknown, nearest is 'lopt'"),
    (["bench", "step", "--output", "{}/no/x.json"], "output={}/no/x.json: its folder does not exist"),
    (["bench", "step", "--num-blocks", "2,x"], "'2,x' is not a comma-separated list of integers"),
    (["bench", "pipeline", "--stages", "0"], "stages=0 is too small; set it to 2 or more"),
    (["bench", "gpu", "--output-dir", "{}/file/new"], "output_dir='{}/file/new': {}/file is a file; name a folder"),
    ([*SIMULATE, "--schedule", "nope"], "schedule='nope': choose among ppll"),
    ([*SIMULATE, "--times", "{}/broken.json"], "times={}/broken.json: not JSON"),
    ([*SIMULATE, "--times", "{}/times.json"], "times={}/times.json: 'backward' is missing"),
    ([*SIMULATE, "--link-gbps", "-1"], "link_gbps=-1.0 must be more than 0; leave it out"),
    ([*SIMULATE, "--latency-us", "nan"], "latency_us=nan is too small; set it to 0 or more"),
    ([*SIMULATE, "--forward-ms", "-3"], "times are finite and not negative"),
    ([*SIMULATE, "--tokens", "0"], "tokens=0 is too small; set it to 1 or more"),
    ([*SIMULATE, "--cores", "0"], "cores=0.0: must be more than 0"),
    ([*SIMULATE, "--timeline", "{}/x.svg"], "timeline={}/x.svg: name a .png file"),
    (
        ["pipeline", "export", "--checkpoint", "{}/base", "--output-dir", "{}/x"],
        "checkpoint='{}/base' has no pipeline.json",
    ),
    (
        ["pipeline", "export", "--checkpoint", "{}/base", "--output-dir", "{}/file/x"],
        "output_dir='{}/file/x': {}/file is a file; name a folder",
    ),
    (["demo", "--model", "{}/noconfig", "--output-dir", "{}/demo"], "--model {}/noconfig cannot be loaded; give a"),
    (["demo", "--model", "none-such", "--output-dir", "{}/demo"], "--model none-such cannot be loaded; give a local"),
    (["demo", "--minutes", "nan"], "--minutes nan is no time; give more than 0"),
    (
        ["demo", "--model", "{}/base", "--learning-rate", "-1"],
        "--learning-rate=-1.0 is too small; set it to 0 or more",
    ),
    (
        ["demo", "--model", "{}/base", "--output-dir", "{}/base"],
        "--output-dir {}/base is not empty; name a new folder",
    ),
    (
        ["demo", "--model", "{}/base", "--output-dir", "{}/file/x"],
        "--output-dir='{}/file/x': {}/file is a file; name a folder",
    ),
    (["demo", "--model", "{}/base", "--dtype", "int8"], "dtype='int8' is unknown; use auto"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name in ("base", "tuned"):
        make_model().save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    make_model().save_pretrained(folder / "tokenless")
    make_tokenizer().save_pretrained(folder / "noweights")
    shutil.copy(folder / "base" / "config.json", folder / "noweights")
    make_dataset(8).to_json(folder / "data.json")
    make_dataset(8).rename_columns({"prompt": "question", "completion": "answer"}).to_json(folder / "qa.json")
    make_pairs(8).to_json(folder / "pairs.json")
    make_questions(8).to_json(folder / "questions.json")
    write_tasks(folder / "tasks")
    for name in ("noconfig", "run", "late", "unfinished/checkpoint-1"):
        (folder / name).mkdir(parents=True)
    files = {"empty.jsonl": "", "file": "x", "broken.json": "{", "times.json": '{"forward": ["a"]}'}
    late = {"data_parallel": 1, "gradient": "delayed", "gradient_recompute": True, "num_stages": 3}
    files |= {"run/trainer_state.json": "{", "late/pipeline.json": json.dumps(late)}
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves lm-eval's tasks out, whose index takes some seconds; and what a launcher would have set."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(
        suites,
        "TaskManager",
        lambda include_path, include_defaults=True: TaskManager(include_path=include_path, include_defaults=False),
    )


def assert_refused(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    output = capfd.readouterr().err
    line = output.splitlines()[-1]
    assert ended.value.code == 2
    assert line.startswith(f"lopt-hf {arguments[0]}") and message in line
    assert "Traceback" not in output and "usage:" not in output


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [(command, *case) for command, cases in OF_A_YAML.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) and value in OF_A_YAML else None,
)
def test_a_bad_value_in_a_yaml(
    command: str,
    changes: dict[str, Any],
    message: str,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = GRID if command == "compare" else {**TRAINING, "dataset_name": f"{{}}/{DATA[command]}"}
    if command == "grpo":
        settings = {name: value for name, value in {**settings, **REWARDED}.items() if name != "max_length"}
    text = json.dumps({**settings, "output_dir": str(tmp_path / "out"), **changes})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(json.loads(text.replace("{}/", f"{folder}/"))))
    assert_refused([command, "--config", str(path)], message.replace("{}/", f"{folder}/"), capfd)


@pytest.mark.parametrize(("arguments", "message"), OF_A_COMMAND_LINE, ids=lambda value: None)
def test_a_bad_value_on_a_command_line(
    arguments: list[str], message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [argument.replace("{}/", f"{folder}/") for argument in arguments]
    assert_refused(given, message.replace("{}/", f"{folder}/"), capfd)


def test_there_are_enough_of_every_command() -> None:
    of_lines = [arguments[0] for arguments, _ in OF_A_COMMAND_LINE]
    assert len(of_lines) + sum(map(len, OF_A_YAML.values())) >= 60
    assert {*OF_A_YAML, *of_lines} == set(cli.COMMANDS) - {"recipes"}
