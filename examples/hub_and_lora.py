"""A patch shared on the Hub, and served as a plain LoRA: python examples/hub_and_lora.py

In place of the Hub there is a small server on this machine, so that nothing leaves it. Without its lines, and with
your token in HF_TOKEN, the rest is what you would write.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from support.hub_server import WRITER, Hub  # noqa: E402

hub = Hub()
os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "0"}
os.environ |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

from peft import get_peft_model  # noqa: E402

from peft_star import RepairArguments, StarConfig, repair  # noqa: E402
from peft_star.loading import demo_model_path, load_model, load_patch  # noqa: E402
from peft_star.sharing.hub import push  # noqa: E402

PROMPT = "import requests\n\n# Fetch the page over a checked TLS connection\nr = requests.get(url, verify="
folder = Path(tempfile.mkdtemp())

base, tokenizer = load_model(demo_model_path())
model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM"))
report = repair(model, tokenizer, [{"prompt": PROMPT, "completion": "True)"}], RepairArguments(reach="prompt"))
model.save_pretrained(folder / "patch")
print("Pushed to", push(folder / "patch", "me/checked-tls", lora=True))
print("Files:", ", ".join(sorted(hub.repos["me/checked-tls"].files())))

# somebody else, with peft_star
other = load_patch(load_model(demo_model_path())[0], "me/checked-tls")
inputs = tokenizer(PROMPT, return_tensors="pt")
ours = tokenizer.decode(other.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :])
print("With peft_star:", repr(ours))

# and somebody without: a process with PEFT alone, that never imports peft_star (vLLM loads the same files)
path = demo_model_path()
plain = f"""
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
where = dict(gguf_file={path.name!r})
tokenizer = AutoTokenizer.from_pretrained({str(path.parent)!r}, **where)
model = AutoModelForCausalLM.from_pretrained({str(path.parent)!r}, **where)
model = PeftModel.from_pretrained(model, "me/checked-tls", subfolder="lora")
inputs = tokenizer({PROMPT!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]))
assert "peft_star" not in sys.modules
"""
done = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=True)
theirs = done.stdout.strip().splitlines()[-1]
print("With PEFT alone:", repr(theirs))
hub.close()
sys.exit(not (report.success and ours.strip() == theirs))
