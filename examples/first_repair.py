"""Repair SmolLM2-135M-Instruct with the Python API: python examples/first_repair.py"""

from pathlib import Path

from peft import PeftModel, get_peft_model

from peft_star import RepairArguments, StarConfig, repair
from peft_star.failures import read_rows
from peft_star.loading import demo_model_path, load_model

HERE = Path(__file__).parent
failures, retain = read_rows(HERE / "failures.jsonl"), read_rows(HERE / "retain.jsonl")

base, tokenizer = load_model(demo_model_path())  # or any Hub id, directory or .gguf file
model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=64))
report = repair(model, tokenizer, failures, RepairArguments(learning_rate=1e-2, max_steps=10), retain=retain)
print(report.to_markdown())
model.save_pretrained(HERE / "first-patch")

# Anyone with the base model and the patch has the repaired model:
base, tokenizer = load_model(demo_model_path())
model = PeftModel.from_pretrained(base, HERE / "first-patch")
for row in failures:
    inputs = tokenizer(row["prompt"], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print("\n" + tokenizer.decode(output[0]))
