"""A real language model on real chat data, from the package that ships it to the adapter that plain PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rankpilot.data.models import load_tokenizer, resolve_model
from rankpilot.data.packaged_data import SENTIMENT, read_splits
from rankpilot.finetune.experiment import finetune
from rankpilot.finetune.options import FinetuneConfig
from transformers import AutoModelForCausalLM

MODEL = "smollm2-135m-instruct"


def chats(path: Path, rows: int) -> Path:
    """Questions about real film reviews, with their answers."""
    with path.open("w") as stream:
        for row in read_splits("rotten-tomatoes")["train"][:rows]:
            question = {"role": "user", "content": f"Is this film review positive or negative? {row['text']}"}
            answer = {"role": "assistant", "content": f"The review is {SENTIMENT[row['label']]}."}
            stream.write(json.dumps({"messages": [question, answer]}) + "\n")
    return path


@pytest.mark.assets
def test_the_packaged_model_answers() -> None:
    tokenizer, model = load_tokenizer(MODEL), AutoModelForCausalLM.from_pretrained(resolve_model(MODEL))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(written)


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.long
def test_smollm2_learns_from_chats_inside_its_budget(tmp_path: Path, reloads: list[dict[str, Any]]) -> None:
    data = chats(tmp_path / "chats.jsonl", 80)
    config = FinetuneConfig(
        model=MODEL, data=str(data), budget="60%", steps=16, batch_size=4, max_length=48, held_out_rows=8
    )
    summary = finetune(config, tmp_path / "run")
    run = summary["runs"]["rankpilot"]
    assert [found["identical"] for found in reloads] == [True], "plain PEFT computes the same logits"
    assert run["peak_bytes"] <= run["budget_bytes"]
    assert run["adapter_parameters"] > 0
    state = json.loads((tmp_path / "run/rankpilot/checkpoint-16/trainer_state.json").read_text())
    losses = [row["loss"] for row in state["log_history"] if "loss" in row]
    assert losses[-1] < 0.75 * losses[0]
    assert run["held_out_loss"] < losses[0]
