"""Sharing patches through the real Hub client: pushing, loading by Hub id, and one sentence for what cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from peft_star import StarConfig
from support.byte_llama import build_model
from support.hub_server import READER, WRITER, Hub, Repo

SOLVABLE = ("--lr", "0.05", "--neurons", "32", "--steps", "200")  # random weights need larger steps than real ones

# huggingface_hub reads its environment at import: another process, which runs what the tests send, has one of its own
WORKER = """
import contextlib, io, json, os, sys, traceback
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    request = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if request["token"]:
        os.environ["HF_TOKEN"] = request["token"]
    out, err, answer = io.StringIO(), io.StringIO(), {}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if "code" in request:
                names = {}
                exec(request["code"], names)
                answer["value"] = names.get("value")
            else:
                from peft_star.cli.app import main
                main(request["args"])
        except SystemExit as exit_:
            answer["code"] = exit_.code or 0
        except BaseException:
            answer["error"] = traceback.format_exc()
    print(json.dumps({**answer, "out": out.getvalue(), "err": err.getvalue()}), file=answers, flush=True)
"""


class Client:
    """A process whose Hub is the one on loopback. `token` is what it finds in its environment."""

    def __init__(self, url: str, home: Path) -> None:
        self.token: str | None = WRITER
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "TQDM_DISABLE": "1"}
        dropped = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE")
        kept = {key: value for key, value in os.environ.items() if key not in dropped}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**kept, **settings, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "COLUMNS": "200"},
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps({**request, "token": self.token}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def run(self, *args: object, code: int = 0) -> dict[str, Any]:
        """Run the command line; with `--json`, its document is `json`."""
        result = self.ask(args=[str(arg) for arg in args])
        assert result.get("code") == code, result.get("error") or result["err"]
        return {**result, "json": json.loads(result["out"]) if "--json" in args else None}

    def refuse(self, *args: object) -> str:
        """Run the command line on what it has to refuse, and return its one sentence."""
        sentence = self.run(*args, code=2)["err"]
        lines = [line for line in sentence.splitlines() if not line.startswith(("Pushing", "Loading"))]
        assert len(lines) == 1 and lines[0].startswith("Error: "), sentence
        return lines[0]

    def python(self, code: str) -> Any:
        """Run Python code and return its `value`."""
        result = self.ask(code=code)
        assert "error" not in result, result["error"]
        return result["value"]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def process(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub.url, tmp_path_factory.mktemp("home"))
    yield client
    client.process.stdin.close()
    client.process.wait(30)


@pytest.fixture
def client(process: Client) -> Iterator[Client]:
    process.token = WRITER
    yield process


@pytest.fixture(scope="module")
def base(hub: Hub, tiny_dir: Path) -> str:
    """The tiny model on the Hub."""
    hub.repos["me/tiny"] = Repo()
    hub.repos["me/tiny"].files().update({path.name: path.read_bytes() for path in tiny_dir.iterdir()})
    return "me/tiny"


@pytest.fixture(scope="module")
def pushed(hub: Hub, process: Client, base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch for the model on the Hub, repaired from there and pushed to me/patch, and where it lies."""
    directory = tmp_path_factory.mktemp("repaired")
    (directory / "failures.jsonl").write_text('{"prompt": "a b", "completion": "cd"}\n')
    push = ("--push-to-hub", "me/patch")
    result = process.run("repair", base, directory / "failures.jsonl", "-o", directory / "patch", *push, *SOLVABLE)
    assert f"Pushed to {hub.url}/me/patch" in result["err"]
    return directory / "patch"


@pytest.fixture
def local(tmp_path: Path) -> Callable[..., Path]:
    """Save a patch of random deltas, of a base model with this name, as PEFT does."""

    def save(name: str = "me/tiny", directory: str = "patch", **changes: Any) -> Path:
        torch.manual_seed(0)
        model = build_model()
        model.name_or_path = model.config._name_or_path = name
        config = StarConfig(**{"task_type": "CAUSAL_LM", "num_neurons": 4, "init_weights": False, **changes})
        # PEFT asks the Hub whether the embeddings were resized, unless it is told
        get_peft_model(model, config).save_pretrained(tmp_path / directory, save_embedding_layers=False)
        return tmp_path / directory

    return save


def text(hub: Hub, repo: str, path: str = "README.md", revision: str = "main") -> str:
    return hub.repos[repo].files(revision)[path].decode()


LOGITS = """
import torch
from transformers import AutoModelForCausalLM
def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 20)[None]).logits
base = lambda: AutoModelForCausalLM.from_pretrained("me/tiny")
"""


# repair --push-to-hub, and loading what it pushed


def test_a_repair_from_the_hub_to_the_hub(hub: Hub, pushed: Path) -> None:
    files = hub.repos["me/patch"].files()
    assert set(files) == {path.name for path in pushed.iterdir()}
    # there is no path in it, so all of it goes as it is but for the card, which now knows the repository
    assert all(files[path.name] == path.read_bytes() for path in pushed.iterdir() if path.name != "README.md")
    card = files["README.md"].decode()
    assert "base_model: me/tiny\n" in card and "pipeline_tag: text-generation" in card
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/patch")' in card
    assert "peft-star repair me/tiny failures.jsonl -o PATCH --neurons 32 --steps 200 --lr 0.05\n" in card
    assert "`star1:" in card  # the fingerprint of the base
    assert hub.messages == ["Upload a STAR patch"]  # one commit


def test_loading_by_hub_id(pushed: Path, client: Client) -> None:
    value = client.python(
        LOGITS
        + f"""
import peft_star
from peft import AutoPeftModelForCausalLM, PeftModel
expected = logits(PeftModel.from_pretrained(base(), {str(pushed)!r}))
ways = {{
    "PeftModel": PeftModel.from_pretrained(base(), "me/patch"),
    "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained("me/patch"),
    "main": PeftModel.from_pretrained(base(), "me/patch", revision="main"),
}}
model = PeftModel.from_pretrained(base(), {str(pushed)!r})
model.load_adapter("me/patch", "second")
model.set_adapter("second")
ways["load_adapter"] = model
model = base()
model.load_adapter("me/patch")
ways["transformers"] = model
value = {{name: torch.equal(logits(way), expected) for name, way in ways.items()}}
value["differs"] = not torch.allclose(logits(base()), expected)
"""
    )
    assert value == dict.fromkeys(
        ("PeftModel", "AutoPeftModel", "main", "load_adapter", "transformers", "differs"), True
    )


def test_commands_take_hub_ids(pushed: Path, client: Client, tmp_path: Path) -> None:
    result = client.run("inspect", "me/patch", "--json")["json"]
    assert result["base_model"] == "me/tiny" and result["report"]["summary"]["success"]
    client.run("merge", "me/tiny", "me/patch", "-o", tmp_path / "merged")
    assert client.python(
        LOGITS
        + f"""
from peft import PeftModel
merged = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r})
value = torch.allclose(logits(merged), logits(PeftModel.from_pretrained(base(), "me/patch")), atol=1e-5)
"""
    )
    client.run("export", "me/patch", "-o", tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


# push


def test_push_replaces_the_generic_card(hub: Hub, client: Client, local: Callable[..., Path]) -> None:
    patch = local()
    before = {path.name: path.read_bytes() for path in patch.iterdir()}
    result = client.run("push", patch, "me/pushed", "--json")
    assert result["json"]["pushed_to"] == f"{hub.url}/me/pushed" and result["err"] == ""
    card = text(hub, "me/pushed")
    assert "More Information Needed" not in card and "peft_star" in card and "# pushed\n" in card
    assert {path.name: path.read_bytes() for path in patch.iterdir()} == before


def test_no_path_goes_along(hub: Hub, client: Client, local: Callable[..., Path], tmp_path: Path) -> None:
    patch = local(str(tmp_path / "secret" / "tiny-base"), base_fingerprint="star1:abc")
    client.run("push", patch, "me/local", "--lora")
    files = hub.repos["me/local"].files()
    assert not [path for path, data in files.items() if b"secret" in data]
    for path in ("adapter_config.json", "lora/adapter_config.json"):
        assert json.loads(files[path])["base_model_name_or_path"] is None
    card = text(hub, "me/local")
    assert "base_model:" not in card and "`tiny-base`" in card and "star1:abc" in card
    # it loads nevertheless, on the model that the user names
    assert client.python(
        LOGITS
        + f"""
from peft import PeftModel
expected = logits(PeftModel.from_pretrained(base(), {str(patch)!r}))
twin = PeftModel.from_pretrained(base(), "me/local", subfolder="lora")
value = torch.equal(logits(PeftModel.from_pretrained(base(), "me/local")), expected)
value = value and torch.allclose(logits(twin), expected, atol=1e-5)
"""
    )


def test_a_relative_path_is_no_hub_id(hub: Hub, client: Client, local: Callable[..., Path]) -> None:
    client.run("push", local("models/tiny"), "me/relative")  # no such directory here, and no such model on the Hub
    assert json.loads(text(hub, "me/relative", "adapter_config.json"))["base_model_name_or_path"] is None
    assert "models/tiny" not in text(hub, "me/relative")


def test_pushing_again_leaves_nothing_of_the_old_patch(hub: Hub, client: Client, local: Callable[..., Path]) -> None:
    patch = local()
    client.run("push", patch, "me/again", "--lora", "--message", "First")
    first = set(hub.repos["me/again"].files())
    assert {"lora/adapter_config.json", "lora/adapter_model.safetensors", "lora/README.md"} < first
    assert 'subfolder="lora"' in text(hub, "me/again")
    client.run("push", patch, "me/again", "-m", "Second")
    assert set(hub.repos["me/again"].files()) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert 'subfolder="lora"' not in text(hub, "me/again")
    assert hub.messages[-2:] == ["First", "Second"]


def test_a_branch(hub: Hub, client: Client, local: Callable[..., Path], pushed: Path, tmp_path: Path) -> None:
    client.run("push", pushed, "me/branches")
    patch = local()
    result = client.run("push", patch, "me/branches", "--revision", "next", "--json")
    assert result["json"]["pushed_to"] == f"{hub.url}/me/branches/tree/next"
    weights = "adapter_model.safetensors"
    assert hub.repos["me/branches"].files("next")[weights] == (patch / weights).read_bytes()
    assert hub.repos["me/branches"].files("main")[weights] == (pushed / weights).read_bytes()
    assert client.run("inspect", "me/branches", "--revision", "next", "--json")["json"]["report"] is None
    assert client.run("inspect", "me/branches", "--json")["json"]["report"]
    merged = ("merge", "me/tiny", "me/branches", "-o")
    client.run(*merged, tmp_path / "next", "--patch-revision", "next")
    client.run(*merged, tmp_path / "main")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("next", "main")]
    assert files[0] != files[1]
    assert "no such revision of me/branches" in client.refuse("inspect", "me/branches", "--revision", "nowhere")


def test_the_ledger_goes_along_with_each_revision(
    hub: Hub, client: Client, pushed: Path, local: Callable[..., Path], tmp_path: Path
) -> None:
    """Read by the Hub id, gone on with by a repair, and gone with a patch that has none."""
    (entry,) = client.run("log", "me/patch", "--json")["json"]["entries"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "xyz", "completion": "!"}\n')
    words = ("--adapter", "me/patch", "-o", tmp_path / "more", "--push-to-hub", "me/ledger")
    client.run("repair", "me/tiny", rows, *words, *SOLVABLE)
    client.run("push", pushed, "me/ledger", "--revision", "first")
    found = client.run("log", "me/ledger", "--json")["json"]
    assert found["entries"][0] == entry and len(found["entries"]) == 2 and found["unaccounted"] < 1e-4
    assert client.run("log", "me/ledger", "--revision", "first", "--json")["json"]["entries"] == [entry]
    assert client.run("check", "me/tiny", "me/ledger", "--json")["json"]["summary"]["failures"] == 2
    assert "name a directory" in client.refuse("revert", "me/ledger", "1")
    client.run("revert", "me/ledger", "1", "-o", tmp_path / "less", "--base", "me/tiny")
    count = client.python(
        LOGITS
        + """
import peft_star
from peft import PeftModel
models = [PeftModel.from_pretrained(base(), "me/ledger", revision=revision) for revision in ("main", "first")]
value = [len(model.peft_config["default"].ledger) for model in models]
"""
    )
    assert count == [2, 1]
    client.python(
        """
import peft_star
from peft import PeftModel
from transformers import AutoModelForCausalLM
PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/tiny"), "me/ledger").push_to_hub("me/again")
"""
    )
    assert len(client.run("log", "me/again", "--json")["json"]["entries"]) == 2
    client.run("push", local(), "me/ledger")
    assert client.run("log", "me/ledger", "--json")["json"]["entries"] == []
    assert not [name for name in hub.repos["me/ledger"].files() if "ledger" in name]


def test_a_private_repository(hub: Hub, client: Client, local: Callable[..., Path]) -> None:
    patch = local()
    client.run("push", patch, "me/private", "--private")
    assert hub.repos["me/private"].private
    client.token = None
    assert "the Hub has none that this token may read" in client.refuse("inspect", "me/private")
    assert "the Hub has none that this token may read" in client.refuse("merge", "me/tiny", "me/private", "-o", "x")
    assert client.run("inspect", "me/private", "--token", READER, "--json")["json"]["parameters"]
    # asking for privacy where the public already reads
    client.token = WRITER
    client.run("push", patch, "me/public")
    before = dict(hub.repos["me/public"].files())
    assert "me/public exists and is public" in client.refuse("push", patch, "me/public", "--private")
    assert hub.repos["me/public"].files() == before


def test_what_is_refused(hub: Hub, client: Client, local: Callable[..., Path], base: str, tmp_path: Path) -> None:
    patch = local()
    repos = set(hub.repos)
    assert "no local patch me/missing, and the Hub has none" in client.refuse("inspect", "me/missing")
    assert "no local model me/missing, and the Hub has none" in client.refuse("merge", "me/missing", patch, "-o", "x")
    assert "This token may not write to me/tiny" in client.refuse("push", patch, base, "--token", READER)
    assert "This token may not write to other/patch" in client.refuse("push", patch, "other/patch")
    assert "does not know this token" in client.refuse("push", patch, "me/new", "--token", "hf_wrong")
    assert "is no name for a repository" in client.refuse("push", patch, "not a repo")
    assert "There is no patch at" in client.refuse("push", tmp_path / "nowhere", "me/new")
    assert "holds a model" in client.refuse("push", model_dir(tmp_path), "me/new")
    client.token = None
    assert "needs a token" in client.refuse("push", patch, "me/new")
    # before any work is done
    rows = tmp_path / "failures.jsonl"
    rows.write_text('{"prompt": "a b", "completion": "cd"}\n')
    assert "needs a token" in client.refuse("repair", "me/tiny", rows, "-o", tmp_path / "x", "--push-to-hub", "me/new")
    assert "--private is about" in client.refuse("repair", "me/tiny", rows, "-o", tmp_path / "x", "--private")
    assert set(hub.repos) == repos


def test_a_large_file_that_does_not_fit(hub: Hub, client: Client, local: Callable[..., Path]) -> None:
    patch = local(num_neurons=5)
    hub.full = True
    try:
        assert "The Hub did not take me/full-hub" in client.refuse("push", patch, "me/full-hub")
    finally:
        hub.full = False


def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_the_revision_of_the_base_goes_along(
    hub: Hub, client: Client, base: str, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    repo = hub.repos[base]
    build_model(seed=1).save_pretrained(tmp_path / "other")
    weights = "model.safetensors"
    repo.commits["1" * 40] = {**repo.files(), weights: (tmp_path / "other" / weights).read_bytes()}
    repo.branches["v2"] = "1" * 40
    rows = write_rows("failures.jsonl", ("a b", "cd"))
    push = ("--push-to-hub", "me/of-v2")
    client.run("repair", base, rows, "--revision", "v2", "-o", tmp_path / "patch", *push, *SOLVABLE)
    assert " --revision v2\n" in text(hub, "me/of-v2")
    assert client.python(
        LOGITS
        + """
import peft_star
from peft import AutoPeftModelForCausalLM, PeftModel
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/tiny", revision="v2"), "me/of-v2")
value = torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("me/of-v2")), logits(model))
"""
    )


def test_a_push_that_is_refused_keeps_the_patch(client: Client, base: str, tmp_path: Path) -> None:
    rows = tmp_path / "failures.jsonl"
    rows.write_text('{"prompt": "a b", "completion": "cd"}\n')
    push = ("--push-to-hub", "other/patch")
    result = client.run("repair", base, rows, "-o", tmp_path / "patch", *push, *SOLVABLE, code=2)
    error = result["err"].splitlines()[-1]
    assert error.startswith("Error: The patch is saved in") and "This token may not write to other/patch" in error
    assert "Traceback" not in result["err"]
    assert (tmp_path / "patch" / "adapter_config.json").is_file()


def test_a_hub_that_is_down_or_switched_off(client: Client, local: Callable[..., Path]) -> None:
    patch = local()
    value = client.python(
        f"""
from huggingface_hub import constants
from peft_star.sharing.hub import push
kept, value = constants.ENDPOINT, []
constants.ENDPOINT = "http://127.0.0.1:9"
try:
    push({str(patch)!r}, "me/new")
except OSError as error:
    value = [type(error).__name__, str(error)]
finally:
    constants.ENDPOINT = kept
"""
    )
    assert value == ["OSError", "The Hub could not be reached to push to me/new."]


@pytest.mark.parametrize("endpoint", ["down", "silent"])
def test_a_patch_that_was_downloaded_needs_no_hub(
    client: Client, hub: Hub, local: Callable[..., Path], endpoint: str
) -> None:
    hub.repos["me/kept"] = Repo()
    hub.repos["me/kept"].files().update({path.name: path.read_bytes() for path in local().iterdir()})
    value = client.python(
        f"""
import socket, time
from huggingface_hub import constants
from peft_star.sharing import download
value, kept, seconds = [str(download.find_patch("me/kept"))], constants.ENDPOINT, download.ANSWER_SECONDS
listening = socket.create_server(("127.0.0.1", 0))  # it answers nobody
port = 9 if {endpoint!r} == "down" else listening.getsockname()[1]
constants.ENDPOINT, download.ANSWER_SECONDS, start = f"http://127.0.0.1:{{port}}", 0.3, time.monotonic()
try:
    value.append(str(download.find_patch("me/kept")))
    download.find_patch("me/nothing")
except OSError as error:
    value += [str(error), time.monotonic() - start]
finally:
    constants.ENDPOINT, download.ANSWER_SECONDS = kept, seconds
    listening.close()
"""
    )
    assert value[0] == value[1] and "kept" in value[0]
    assert value[2] == "There is no local patch me/nothing, and the Hub could not be reached."
    assert value[3] < 5


# model.push_to_hub


PUSH = """
import copy, gc, pickle, weakref, torch, peft_star
from pathlib import Path
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
base = lambda name="me/tiny": AutoModelForCausalLM.from_pretrained(name)
config = lambda: peft_star.StarConfig(task_type="CAUSAL_LM", num_neurons=4, init_weights=False)
"""


def test_push_to_hub_keeps_our_card(hub: Hub, client: Client, base: str, pushed: Path) -> None:
    client.python(
        PUSH
        + f"""
from peft_star import RepairReport
from peft_star.tuner.patches import remember_report
model = PeftModel.from_pretrained(base(), {str(pushed)!r})
remember_report(model, "default", RepairReport.load({str(pushed / "repair_report.json")!r}))
model.push_to_hub("me/api", tags=["mine"], private=True)
model.push_to_hub("me/api", revision="next", commit_message="Again")
"""
    )
    card = text(hub, "me/api")
    assert "More Information Needed" not in card and "base_model: me/tiny\n" in card and "- mine\n" in card
    assert "failing tokens solved" in card and "# api\n" in card
    assert set(hub.repos["me/api"].files()) == {path.name for path in pushed.iterdir()}
    assert hub.messages[-2:] == ["Upload a STAR patch", "Again"] and hub.repos["me/api"].private
    assert text(hub, "me/api", revision="next") == card


def test_push_to_hub_from_a_local_base(hub: Hub, client: Client, tiny_dir: Path) -> None:
    client.python(PUSH + f'get_peft_model(base({str(tiny_dir)!r}), config()).push_to_hub("me/api-local")')
    assert not [path for path, data in hub.repos["me/api-local"].files().items() if str(tiny_dir).encode() in data]
    assert "`tiny-llama`" in text(hub, "me/api-local")


def test_push_to_hub_keeps_what_people_wrote(hub: Hub, client: Client, base: str) -> None:
    push = PUSH + 'model = get_peft_model(base(), config())\nmodel.push_to_hub("me/edited", tags=["new"])'
    client.python(push)
    files = hub.repos["me/edited"].files()
    files["README.md"] = files["README.md"].replace(b"# edited\n", b"# My own words\n")
    client.python(push)
    assert "# My own words\n" in text(hub, "me/edited")


def test_named_adapters(hub: Hub, client: Client, base: str) -> None:
    equal = client.python(
        PUSH
        + """
model = get_peft_model(base(), config(), adapter_name="first")
model.add_adapter("second", config())
model.push_to_hub("me/named")
again = PeftModel.from_pretrained(base(), "me/named", adapter_name="second", subfolder="second")
tokens = torch.arange(3, 20)[None]
model.set_adapter("second")
value = torch.equal(model.eval()(tokens).logits, again.eval()(tokens).logits)
"""
    )
    assert equal
    assert 'subfolder="first"' in text(hub, "me/named")
    assert {"first/adapter_config.json", "second/adapter_model.safetensors"} < set(hub.repos["me/named"].files())


def test_the_instance_stays_an_ordinary_one(client: Client, base: str, tmp_path: Path) -> None:
    """What keeps the card holds no model: it can be copied, pickled and freed."""
    value = client.python(
        PUSH
        + f"""
model = get_peft_model(base(), config())
model.save_pretrained({str(tmp_path / "patch")!r})
assert "_upload_modified_files" in model.__dict__
copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
value = [type(item).__name__ for item in (copied, pickled)]
held = gc.get_referents(model._upload_modified_files)
value.append(any(isinstance(item, torch.nn.Module) for item in held))
"""
    )
    assert value == ["PeftModelForCausalLM", "PeftModelForCausalLM", False]


def test_a_full_model_is_pushed_as_ever(hub: Hub, client: Client, pushed: Path) -> None:
    """transformers keeps adapters in the model itself, which after their removal is pushed as a model again."""
    client.python(
        PUSH
        + """
model = base()
model.load_adapter("me/patch")
model.push_to_hub("me/through-transformers")
model.delete_adapter("default")
model._hf_peft_config_loaded = False
model.push_to_hub("me/full")
"""
    )
    assert "peft_star" in text(hub, "me/through-transformers")
    assert "adapter_config.json" in hub.repos["me/through-transformers"].files()
    assert "More Information Needed" in text(hub, "me/full")
