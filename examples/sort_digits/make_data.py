"""The demo's task as files, for a run through the command line: a model folder, demonstrations, problems.

    python make_data.py [--correct]

`--correct` gives 150 right demonstrations instead of thousands of mostly wrong ones: GRPO then gains pure skill.
"""

import argparse
import json
from pathlib import Path

from grpo.demo import NUM_EVAL, make_demonstrations, make_model, make_problems, make_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--correct", action="store_true")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

tokenizer = make_tokenizer()
make_model(tokenizer, arguments.seed).save_pretrained("model")
tokenizer.save_pretrained("model")
problems = make_problems(NUM_EVAL + 8000, arguments.seed)
held_out, train = problems[:NUM_EVAL], problems[NUM_EVAL:]
if arguments.correct:
    demonstrations = [{"prompt": row["prompt"], "completion": row["answer"]} for row in train[:150]]
else:
    demonstrations = make_demonstrations(train, arguments.seed)
for name, rows in {"sft.jsonl": demonstrations, "train.jsonl": train, "eval.jsonl": held_out}.items():
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{name}: {len(rows)} rows")
