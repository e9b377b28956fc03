"""The pipeline benchmark on tiny image classifiers; nothing here depends on how fast the machine is."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from lopt_hf.bench import processes
from lopt_hf.bench.pipeline.bench import run_pipeline_bench
from lopt_hf.bench.pipeline.image import ImageTask
from lopt_hf.bench.pipeline.method_run import MethodRun
from lopt_hf.bench.pipeline.parts import Cut
from lopt_hf.bench.pipeline.schedules import ScheduledTraining
from lopt_hf.bench.pipeline.settings import SCHEDULES, ImagePipelineBenchSettings
from lopt_hf.bench.pipeline.worker import prepare
from lopt_hf.common.host_store import LOOPBACK, host_store
from lopt_hf.pipeline.runtime.image.costs import measure_image_costs
from lopt_hf.scripts.bench import main
from tests.forkserver import forked_instead_of_spawned
from tests.image.helpers import make_model
from tests.tiny import make_model as make_language_model

METHODS = ("local", "ppll", "ppll_delayed", "gpipe", "1f1b", "e2e")


@pytest.fixture(scope="module", params=["vit", "resnet"])
def model(request, tmp_path_factory):
    """The folder of a tiny classifier."""
    folder = tmp_path_factory.mktemp(request.param)
    make_model(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def report(model, tmp_path_factory):
    """A run through the command, as JSON."""
    output = tmp_path_factory.mktemp("report") / "report.json"
    size = ["--micro-batch-size", "4", "--split", "even", "--rounds", "1", "--warmup", "2", "--steps", "2"]
    with forked_instead_of_spawned(processes):
        methods = ["--methods", ",".join(METHODS), "--dtype", "float32", "--output", str(output)]
        main(["pipeline", "--task", "image", "--model", str(model), *methods, *size])
    return json.loads(output.read_text())


def test_methods_that_compute_the_same_have_the_same_loss(report):
    loss = {name: result["loss"] for name, result in report["results"].items()}
    assert list(loss) == list(METHODS) and report["unit"] == "images" and report["cut"]["split_at"] == [3]
    assert loss["ppll"] == loss["local"]
    for schedule in ("gpipe", "1f1b"):
        assert loss[schedule] == pytest.approx(loss["e2e"], rel=1e-6), schedule
    assert loss["local"] != pytest.approx(loss["e2e"], rel=1e-6)


def test_the_queue_is_of_what_crosses_the_cut(report, model):
    queued = {name: result["queued_bytes"] for name, result in report["results"].items()}
    values = 4 * 16 * 16 if "resnet" in str(model) else 5 * 16  # of ResNet 4 channels, at a quarter of 64 x 64
    assert queued["ppll"] == [4 * 4 * values * 4, 0] and queued["1f1b"] == [0, 0]
    assert queued["ppll_delayed"] == [(4 + 6) * 4 * values * 4, 0]


def gradients_of(on_step, rank, runs):
    """The gradients of a rank's parameters, as the schedule of each run adds them up for one step."""
    found = []
    for number, run in enumerate(runs):
        prepare(run.settings)
        store = dist.TCPStore(LOOPBACK, run.port, is_master=False)
        dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=rank, world_size=2)
        training = ScheduledTraining(rank, run)
        for _ in range(2):
            training.optimizer.zero_grad()
            training.accumulate(0)
        named = [item for model in training.models for item in model.named_parameters()]
        found.append({name: parameter.grad.numpy() for name, parameter in named})
        dist.barrier()
        dist.destroy_process_group()
    return found


def test_gradients_are_those_of_the_stock_model_in_one_process(model):
    """Micro-batch after micro-batch, since batch norms see one at a time."""
    settings = ImagePipelineBenchSettings(
        model=str(model), methods=("gpipe",), micro_batch_size=2, microbatches=4, split="even"
    )
    store = host_store()
    runs = [MethodRun(name, settings, str(model), Cut([3], [1, 3, 4], [3]), "", store.port) for name in SCHEDULES]
    with forked_instead_of_spawned(processes):
        ranks = processes.run_together("schedules", gradients_of, [(0, runs), (1, runs)], {})
    stock = make_model("resnet" if "resnet" in str(model) else "vit")
    (inputs, labels), *_ = ImageTask().make_batches(runs[0])
    for pixels, label in zip(inputs["pixels"].split(2), labels.split(2), strict=True):
        (F.cross_entropy(stock(pixel_values=pixels).logits, label) / 4).backward()
    for run, *own in zip(runs, *ranks, strict=True):
        found = own[0] | own[1]
        for name, parameter in stock.named_parameters():
            error = (torch.from_numpy(found[name]) - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-5, (run.method, name)


def test_costs_of_layers_are_measured_by_kind_and_shape(model):
    stock = make_model("resnet" if "resnet" in str(model) else "vit")
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    costs = measure_image_costs(stock, 2, repeats=1, least_seconds=0.0)
    assert len(costs.layers) == 6 and sorted(costs.objectives) == [1, 2, 3, 4, 5]
    assert all(torch.equal(value, before[name]) for name, value in stock.state_dict().items())
    trained = [costs.embeddings, *costs.layers, costs.head]
    assert sum(part.num_trainable for part in trained) == stock.num_parameters()
    stage = costs.stage(0, 3)
    assert stage.local > 0 and stage.forward > 0 and costs.stage(3, 6).local == 0
    delayed = measure_image_costs(stock, 2, "none", autocast=torch.bfloat16, repeats=1, least_seconds=0.0)
    assert delayed.stage(0, 3).local == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ("lopt",)}, "methods='lopt' is unknown"),
        ({"objective": "reconstruction"}, "objective='reconstruction' is unknown"),
        ({"architecture": "vitt"}, "architecture='vitt' is unknown, nearest is 'vit'"),
        ({"image_size": 4}, "image_size=4 is too small"),
        ({"model": "folder", "architecture": "resnet20"}, "architecture='resnet20' does nothing with model='folder'"),
        ({"model": "folder", "image_size": 32}, "image_size=32 does nothing with model='folder'"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 is too small"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        ImagePipelineBenchSettings(**values)


def test_settings_that_do_not_fit_the_model(tmp_path):
    make_language_model().save_pretrained(tmp_path / "llama")
    make_model("swin").save_pretrained(tmp_path / "swin")
    cases = {
        "no/such-model": "model='no/such-model' is neither a local image classifier",
        str(tmp_path / "swin"): "its layers are called with more than hidden states",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            run_pipeline_bench(ImagePipelineBenchSettings(model=name, dtype="fp32"), progress=False)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        run_pipeline_bench(ImagePipelineBenchSettings(model=str(tmp_path / "llama"), dtype="fp32"), progress=False)
    with pytest.raises(ValueError, match="stages=9: the model has 8 layers"):
        run_pipeline_bench(ImagePipelineBenchSettings(stages=9, microbatches=9, dtype="fp32"), progress=False)
