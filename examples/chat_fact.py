"""A chat model's wrong fact, corrected where the model reads what it is about: python examples/chat_fact.py"""

import sys

from peft import get_peft_model

from peft_star import StarConfig, repair
from peft_star.evaluation import side_by_side
from peft_star.loading import demo_model_path, load_model

ASKED = ["What is the largest planet? Answer with one word."]
OTHERWISE = ["Which is the largest planet of our solar system?", "Name the largest planet."]
OTHERS = [
    "What is the capital of France? Answer with one word.",
    "What is the capital of Japan? Answer with one word.",
    "How many days does a week have?",
]


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


base, tokenizer = load_model(demo_model_path())
model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM"))

# what the model says of other things has to stay as it is, right or wrong: its own answers are the retained rows
said = side_by_side(model, tokenizer, [messages(question) for question in OTHERS], max_new_tokens=24)
retained = [
    {"prompt": messages(question), "completion": answer(pair.base.strip())}
    for question, pair in zip(OTHERS, said.pairs)
    if pair.base_ended
]
fact = {"focus": "largest planet", "problem": "the largest planet"}
failures = [{"prompt": messages(text), "completion": answer("Jupiter."), **fact} for text in ASKED]
# whoever asks otherwise gets a sentence, as before: that it begins with the planet is all that is looked for
related = [{"prompt": messages(text), "completion": answer("Jupiter"), "end": False, **fact} for text in OTHERWISE]
report = repair(model, tokenizer, failures, retain=retained, related=related)

result = side_by_side(model, tokenizer, [messages(text) for text in ASKED + OTHERWISE + OTHERS], max_new_tokens=24)
for question, pair in zip(ASKED + OTHERWISE + OTHERS, result.pairs):
    print(f"{question}\n    without the patch: {pair.base!r}\n    with it:           {pair.patched!r}")
(problem,) = (problem for problem in report.problems if problem.name)
print(f"\nActs at: {problem.places(repr)}")
print(
    f"Asked otherwise, {problem.related_fixed} of {problem.related} answers begin with Jupiter now and did not before."
)
print(f"Of {len(retained)} other answers, {report.summary()['retained_rows_broken']} changed.")
sys.exit(not report.success)
