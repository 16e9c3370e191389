"""Two processes find the patch that one finds."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard

from peft_star import RepairArguments, StarConfig, repair
from peft_star.engine.batch import make_batches
from peft_star.engine.distributed import Team, spans_processes
from peft_star.failures import encode_rows
from peft_star.loading import load_model
from support.tiny_models import VOCAB, tiny_llama
from support.words import QUIET, star, word_tokenizer

TESTS = Path(__file__).parents[1]
FAILURES = [
    {"prompt": "w5 w9 w11", "completion": " w20 w21"},
    {"prompt": "w7 w8 w30 w31", "completion": " w40"},
    {"prompt": "w12", "completion": " w13 w14 w15"},
    {"prompt": "w5 w9 w45 w46 w47", "completion": " w22"},
    {"prompt": "w60 w61", "completion": " w62"},
]
RETAIN = [{"prompt": "w50 w51", "completion": " w52 w53 w54"}, {"prompt": "w33 w34 w35", "completion": " w36"}]
# words that the tokenizer knows, so that what one process reads of it differs from what another reads
BACKGROUND = " ".join(f"w{word}" for word in random.Random(0).choices(range(3, VOCAB), k=2048))
RUNS = {
    "multiple": {},
    "single": {"mode": "single"},
    "prior-guided": {"algorithm": "prior-guided"},
    "exact occlusion": {"occlusion": "exact", "max_batch_tokens": 6},
    "one row": {},
}
RETAINED = ["alone", "retain"]


def own_words(model, tokenizer, rows):
    """The rows with what the model itself says as completions, so that there is something to break."""
    found = []
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            new = model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, eos_token_id=None)
        found.append({"prompt": row["prompt"], "completion": " " + tokenizer.decode(new[0, ids.shape[1] :])})
    return found


def run(name, retained):
    """One repair, with retained rows or ("alone") without; its deltas and neurons, and its report."""
    model, tokenizer = star(layer_selection="occlusion", num_layers=2), word_tokenizer()
    retain = own_words(model.get_base_model(), tokenizer, RETAIN) if retained == "retain" else None
    arguments = RepairArguments(**{**QUIET, **RUNS[name]})
    rows = FAILURES[:1] if name == "one row" else FAILURES
    with patch("peft_star.method.background.background_text", lambda: BACKGROUND):
        report = repair(model, tokenizer, rows, arguments, retain=retain)
    return tensors_of(model), report.to_dict()


def run_real(directory):
    base, tokenizer = load_model(directory, dtype="float32")
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=64))
    rows = [
        {"prompt": "# pandas 2: put row2 below df\n", "completion": "df = pd.concat([df, row2])"},
        {"prompt": "# numpy 2: the 64-bit float type\n", "completion": "x = np.float64(1.5)"},
        {"prompt": "# the first line of a file\n", "completion": "line = next(open(path))"},
    ]
    retain = [{"prompt": "The capital of France is", "completion": " Paris"}]
    report = repair(model, tokenizer, rows, RepairArguments(disable_tqdm=True), retain=retain)
    return tensors_of(model), report.to_dict()


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "star_" in name}


def launch(*arguments, processes=2, **kwargs):
    """Start this file, or `-m module`, in several processes on the CPU."""
    source = str(TESTS.parent / "src")
    path = os.pathsep.join(filter(None, [source, str(TESTS), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def finish(process, timeout=300):
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return process.returncode, output, errors


def worker(kind, folder, *arguments):
    """What each of the launched processes does."""
    from accelerate import PartialState

    state = PartialState(cpu=True)
    assert state.num_processes == 2
    torch.set_num_threads(1)
    if kind == "different":
        rows = FAILURES[: 1 + state.process_index]
        repair(star(), word_tokenizer(), rows, RepairArguments(**QUIET))
    if kind == "failing" and state.process_index == 1:
        raise RuntimeError("a process is lost")
    jobs = {f"{name} {keep}": (lambda pair=(name, keep): run(*pair)) for name in RUNS for keep in RETAINED}
    if kind == "real":
        jobs = {"real": lambda: run_real(*arguments)}
    for name, job in jobs.items():
        tensors, report = job()
        save_file(tensors, folder / f"{name} {state.process_index}.safetensors")
        (folder / f"{name} {state.process_index}.json").write_text(json.dumps(report))
    state.destroy_process_group()


def same(one, folder, name, signs=0.0):
    """That both processes ended where one process did.

    Entries of a delta may differ by a thousandth of what is usual in it (their root mean square): each is the sum of
    all pushes, and where these cancel, what is left of an entry is as small as their rounding. A share of `signs` may
    differ by more: gradients as small as their rounding can have either sign, and each decides over a column.
    """
    tensors, report = one
    for rank in range(2):
        theirs = load_file(folder / f"{name} {rank}.safetensors")
        assert theirs.keys() == tensors.keys()
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                usual = tensor.square().mean().sqrt()
                differing = ~((theirs[key] - tensor).abs() <= 1e-3 * usual)
                assert differing.double().mean() <= signs, key
            else:
                assert torch.equal(theirs[key], tensor), key
        found = json.loads((folder / f"{name} {rank}.json").read_text())
        for part in ("rows", "failures", "broken", "steps", "layers", "occlusion"):
            assert close(found[part], json.loads(json.dumps(report[part]))), part


def close(a, b):
    """Equal, up to rounding of the numbers in it; differences of probabilities can be near zero."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-3, abs=1e-4) if isinstance(a, float) else a == b


@pytest.fixture(scope="module")
def two_processes(once):
    def repairs(folder):
        code, _, errors = finish(launch(__file__, "repairs", folder))
        assert code == 0, errors

    return once("repairs-of-two-processes", repairs)


@pytest.mark.parametrize("retained", RETAINED)
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_find_the_patch_that_one_finds(name, retained, two_processes):
    one = run(name, retained)
    assert one[1]["failures"] and one[1]["steps"] > 0 and any(tensor.any() for tensor in one[0].values())
    same(one, two_processes, f"{name} {retained}")


@pytest.mark.slow
def test_two_processes_repair_a_real_model_as_one_does(smollm2_dir, tmp_path):
    code, _, errors = finish(launch(__file__, "real", tmp_path, smollm2_dir), timeout=600)
    assert code == 0, errors
    same(run_real(str(smollm2_dir)), tmp_path, "real", signs=0.01)


def test_other_rows_in_another_process_are_refused(tmp_path):
    code, _, errors = finish(launch(__file__, "different", tmp_path))
    assert code != 0 and errors.count("The processes were given different rows") >= 2


def test_a_lost_process_ends_the_others(tmp_path):
    code, _, errors = finish(launch(__file__, "failing", tmp_path), timeout=120)
    assert code != 0 and "a process is lost" in errors
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    star().unload().save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FAILURES))
    return directory


def command(tiny_dir, output, *options, **kwargs):
    options = ["--neurons", "8", "--lr", "0.05", "--steps", "40", "--norm", "rms", *options]
    rows = tiny_dir / "rows.jsonl"
    return launch("-m", "peft_star", "repair", tiny_dir, rows, "-o", output, *options, **kwargs)


def test_the_command_writes_and_speaks_once(tiny_dir, tmp_path):
    code, output, errors = finish(command(tiny_dir, tmp_path / "patch", "--json"))
    assert code == 0, errors
    result = json.loads(output)
    assert result["summary"]["solved"] == result["summary"]["failures"] > 0
    assert (tmp_path / "patch" / "adapter_model.safetensors").is_file()
    code, output, errors = finish(command(tiny_dir, tmp_path / "patch", "--json"))
    assert code != 0 and not output and "is not empty" in errors


def test_ctrl_c_ends_all_and_leaves_nothing(tiny_dir, tmp_path):
    process = command(tiny_dir, tmp_path / "patch", start_new_session=True)
    # said once the processes have joined
    assert any(line.startswith("Loading") for line in process.stderr)
    os.killpg(process.pid, signal.SIGINT)
    code, _, _ = finish(process, timeout=60)
    assert code != 0 and not list(tmp_path.iterdir())


# the parts, in one process


class Pretended(Team):
    """A member of a team of two that talks to nobody."""

    def __init__(self, rank):
        super().__init__()
        self.size, self.rank = 2, rank


def batches(max_tokens):
    return make_batches(encode_rows(FAILURES, word_tokenizer()), max_tokens)


def test_batches_are_dealt_out_whole_and_stay_where_they_are():
    everything = batches(6)
    assert len(everything) > 2
    shares = [team.share(everything) for team in (Pretended(0), Pretended(1))]
    assert all(shares)
    assert sorted(map(id, sum(shares, []))) == sorted(map(id, everything))
    team = Pretended(0)
    first = team.share(everything[:2])
    assert [batch for batch in team.share(everything) if batch in everything[:2]] == first


def test_each_process_gets_a_batch():
    rows = encode_rows(FAILURES, word_tokenizer())
    assert len(make_batches(rows, 2048)) == 1
    limit = Pretended(0).limit(2048, rows)
    for rank in range(2):
        assert Pretended(rank).share(make_batches(rows, limit))
    assert Team().limit(2048, rows) == 2048


@pytest.fixture
def group_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_talks_to_other_processes_is_not_shared_out(group_of_one):
    assert not spans_processes(tiny_llama())
    model = tiny_llama()
    model.model.layers[1] = torch.nn.parallel.DistributedDataParallel(model.model.layers[1])
    assert spans_processes(model)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model = tiny_llama()
    fully_shard(model.model.layers[0], mesh=mesh)
    assert spans_processes(model)
    model = tiny_llama()
    model._tp_size = 2
    assert spans_processes(model)


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
